"""One token from one row of logits: see the reference. Settings and the history lie in device memory, so that a graph can end with it."""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.steps import Launch, call

ARGS = ("logits", "logits.0", "history", "history.rows", "settings", "token", "workspace", "state")
SETTINGS = ("temperature", "top_p", "min_p", "repeat_penalty", "uniform", "top_k")  # float64, in this order
THREADS = 256


def sample(logits, history, *, temperature, top_k, top_p, min_p, repeat_penalty, uniform):
    from edgeattn.kernels_cuda import sample as kernel
    settings, token = np.array([temperature, top_p, min_p, repeat_penalty, uniform, top_k], np.float64), np.zeros(1, np.int64)
    logits, history = np.ascontiguousarray(logits, np.float32), np.ascontiguousarray(history, np.int64)
    tensors = dict(logits=logits, history=history, settings=settings, token=token)
    call(kernel, tensors, outputs=("token",))
    return token


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """The logits after the penalty, and four lists of tokens."""
    return 64 + 20 * tensors["logits"].shape[0]


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    vocab, given, workspace, settings = np.int32(a["logits.0"]), np.int64(a["logits"]), np.int64(a["workspace"]), np.int64(a["settings"])
    wide = min(-(-a["logits.0"] // THREADS), 2 * device.about()["processors"]), 1, 1
    history = np.int64(a["history"]), np.int64(a["state"]), np.int32(a["history.rows"])

    def launch(kernel, grid, threads, *args):
        return Launch(compile.function("sample", kernel), grid, threads, args, overlap=True)
    return [launch("sample_copy", wide, THREADS, given, workspace, vocab),
            launch("sample_penalise", (8, 1, 1), THREADS, given, *history, settings, workspace, vocab),
            launch("sample_best", wide, THREADS, workspace, vocab),
            launch("sample_choose", (1, 1, 1), 1024, settings, workspace, vocab, np.int64(a["token"]))]
