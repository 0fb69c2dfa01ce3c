"""llama.cpp through llama-cpp-python's C functions: Q4_0 weights, flash attention, as llama-bench calls it.

The variant is the type of its cache: f16 (the default), q8_0 or q4_0.
"""
import ctypes
from pathlib import Path

KV_BYTES = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
PIECE = 1024  # tokens that a filled cache's sequences have
REQUIRES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "numpy": "numpy"}


def prepare(checkpoint: Path, folder: Path, config: dict, variant: str, device: str = "cpu") -> dict:
    """Write the GGUF file if it is not there; what a token reads of it."""
    import llama_cpp
    from gguf_checkpoint import tensor_types, write_q4_0
    log = _collect_log(llama_cpp)
    if device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("llama-cpp-python was built without CUDA; install it with CMAKE_ARGS=-DGGML_CUDA=ON")
    try:
        path = write_q4_0(checkpoint, folder / "llama_cpp.gguf")
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {''.join(log[-3:])}") from None
    sizes = {name: size for name, (_, size) in tensor_types(path).items()}
    looked_up = sizes["token_embd.weight"] if "output.weight" in sizes else 0  # a tied embedding is read whole, as the head
    head = tensor_types(path)["output.weight" if looked_up else "token_embd.weight"][0]
    variant = variant or "f16"
    if variant not in KV_BYTES:
        raise ValueError(f"a variant of llama_cpp is one of {', '.join(KV_BYTES)}, got {variant!r}")
    return {"path": str(path), "weight_bytes": sum(sizes.values()) - looked_up, "kv_element_bytes": KV_BYTES[variant],
            "formats": f"Q4_0, head {head}, cache {variant}"}


def _collect_log(llama_cpp):
    lines = []

    def keep(level, text, user_data):
        lines.append(text.decode(errors="replace"))
    _collect_log.callback = llama_cpp.llama_log_callback(keep)  # ctypes does not keep it alive
    llama_cpp.llama_log_set(_collect_log.callback, ctypes.c_void_p(0))
    return lines


class Engine:
    def __init__(self, path: str, context: int, threads: int, variant: str, device: str = "cpu"):
        import llama_cpp
        self.llama, self.path, self.variant = llama_cpp, Path(path), variant or "f16"
        log = _collect_log(llama_cpp)
        llama_cpp.llama_backend_init()
        about = llama_cpp.llama_model_default_params()
        about.n_gpu_layers = 999 if device == "cuda" else 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), about)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not open {path}: {''.join(log[-3:])}")
        self.params = params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0,
                                         "q4_0": llama_cpp.GGML_TYPE_Q4_0}[self.variant]
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

    def fill(self, length: int) -> None:
        """Hold `length` tokens, from a file beside the model that is made the first time: reading 32K tokens takes it 20 minutes.

        They are read in sequences of PIECE tokens at the positions that they will have, which then become one: a step's time depends on how
        many tokens the cache holds, not on what they were computed from.
        """
        file, count = self.path.with_name(f"{self.path.stem}-{self.variant}-{length}.state"), self.llama.ctypes.c_size_t()
        self.llama.llama_memory_clear(self.memory, True)
        tokens = (self.llama.llama_token * length)()
        if not file.exists():
            self._make_state(file, length)
        if not self.llama.llama_state_seq_load_file(self.context, str(file).encode(), 0, tokens, length, ctypes.byref(count)):
            raise RuntimeError(f"llama.cpp could not read {file}: remove it")

    def _make_state(self, file, length):
        llama, params = self.llama, type(self.params).from_buffer_copy(self.params)
        pieces = -(-length // PIECE)
        params.n_ctx, params.n_seq_max, params.kv_unified = pieces * PIECE, pieces + 1, True
        context = llama.llama_init_from_model(self.model, params)
        memory, batch = llama.llama_get_memory(context), llama.llama_batch_init(params.n_batch, 0, 1)
        for start in range(0, length, params.n_batch):
            batch.n_tokens, own = min(params.n_batch, length - start), 1 + start // PIECE
            for i in range(batch.n_tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = 1 + (start + i) * 7919 % 1000, start + i, 1, own
                batch.logits[i] = 0
            if llama.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode failed at token {start}")
        for piece in range(pieces):
            llama.llama_memory_seq_cp(memory, 1 + piece, 0, -1, -1)
        for piece in range(pieces):
            llama.llama_memory_seq_rm(memory, 1 + piece, -1, -1)
        tokens, part = (llama.llama_token * length)(), file.with_suffix(".part")
        if not llama.llama_state_seq_save_file(context, str(part).encode(), 0, tokens, length):
            raise RuntimeError(f"llama.cpp could not write {part}")
        part.replace(file)
        llama.llama_batch_free(batch)
        llama.llama_free(context)
