"""llama.cpp through llama-cpp-python's C functions: Q4_0 weights, flash attention, 16-bit cache, as llama-bench calls it."""
import ctypes
from pathlib import Path

REQUIRES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "numpy": "numpy"}


def prepare(checkpoint: Path, folder: Path, config: dict) -> dict:
    """Write the GGUF file if it is not there; what a token reads of it."""
    import llama_cpp
    from gguf_checkpoint import tensor_types, write_q4_0
    log = _collect_log(llama_cpp)
    try:
        path = write_q4_0(checkpoint, folder / "llama_cpp.gguf")
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {''.join(log[-3:])}") from None
    sizes = {name: size for name, (_, size) in tensor_types(path).items()}
    looked_up = sizes["token_embd.weight"] if "output.weight" in sizes else 0  # a tied embedding is read whole, as the head
    head = tensor_types(path)["output.weight" if looked_up else "token_embd.weight"][0]
    return {"path": str(path), "weight_bytes": sum(sizes.values()) - looked_up, "kv_element_bytes": 2,
            "formats": f"Q4_0, head {head}, cache f16"}


def _collect_log(llama_cpp):
    lines = []

    def keep(level, text, user_data):
        lines.append(text.decode(errors="replace"))
    _collect_log.callback = llama_cpp.llama_log_callback(keep)  # ctypes does not keep it alive
    llama_cpp.llama_log_set(_collect_log.callback, ctypes.c_void_p(0))
    return lines


class Engine:
    def __init__(self, path: str, context: int, threads: int):
        import llama_cpp
        self.llama = llama_cpp
        log = _collect_log(llama_cpp)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not open {path}: {''.join(log[-3:])}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        features = llama_cpp.llama_print_system_info().decode()
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.settings = " ".join(part.split(" = ")[0].strip() for part in features.split(":", 1)[1].split("|") if "= 1" in part)

    def forward(self, tokens: list[int]) -> None:
        """Append tokens; the last one's logits are computed."""
        array = (self.llama.llama_token * len(tokens))(*tokens)
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        self.llama.llama_synchronize(self.context)

    def truncate(self, length: int) -> None:
        self.llama.llama_memory_seq_rm(self.memory, 0, length, -1)
