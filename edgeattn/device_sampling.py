"""The next token, chosen on the GPU from logits that stay there: the host waits for the token alone."""
import numpy as np

from edgeattn.device_batch import TO_DEVICE, Pinned
from edgeattn.kernels_cuda import device, sample
from edgeattn.kernels_cuda.steps import run

TO_HOST = 2  # cudaMemcpyDeviceToHost


class DeviceSampler:
    """Runs the operator `sample` on rows of logits in device memory."""

    def __init__(self, vocab: int, most_tokens: int, stream):
        """most_tokens: that a repeat penalty may look back on."""
        xp = device.cupy()
        with stream:
            self._given = Pinned(8 * most_tokens + 4 * 64)
            self._token = xp.zeros(1, np.int64)
            self._workspace = xp.zeros(sample.workspace_bytes({"logits": np.empty(vocab, np.float32)}, {}, 1, 1), np.uint8)
        self._settings, self._count = self._given.array(len(sample.SETTINGS), np.float64), self._given.array(1, np.int64)
        self._history = self._given.array(most_tokens, np.int64)
        self._answer = Pinned(64, on_device=False).array(1, np.int64)
        self._vocab, self._stream, self._launches = vocab, stream, {}

    @property
    def nbytes(self) -> int:
        return self._workspace.nbytes + self._given.device.nbytes

    def __call__(self, logits: int, settings: dict, history: np.ndarray) -> int:
        """logits: address of a row; settings: the operator's attributes -> the token. Of a long history the newest tokens count."""
        history, runtime = history[-len(self._history):], device.cupy().cuda.runtime
        self._settings[:] = [settings[name] for name in sample.SETTINGS]
        self._count[0], self._history[:len(history)] = len(history), history
        size = self._history.ctypes.data - self._given.host.ctypes.data + 8 * len(history)
        runtime.memcpyAsync(self._given.device.data.ptr, self._given.host.ctypes.data, size, TO_DEVICE, self._stream.ptr)
        if logits not in self._launches:
            self._launches[logits] = self._made(logits)
        run(self._launches[logits], self._stream)
        runtime.memcpyAsync(self._answer.ctypes.data, self._token.data.ptr, 8, TO_HOST, self._stream.ptr)
        self._stream.synchronize()
        return int(self._answer[0])

    def _made(self, logits):
        address = self._given.address
        return sample.launches({"logits": logits, "logits.0": self._vocab, "history": address(self._history), "history.rows": 0,
                                "settings": address(self._settings), "token": self._token.data.ptr, "workspace": self._workspace.data.ptr,
                                "state": address(self._count)}, {})


class LogitsRow:
    """One row of logits on the device, good until the next forward call: sample() instead of the logits themselves."""

    def __init__(self, sampler: DeviceSampler, address: int):
        self._sampler, self._address = sampler, address

    def sample(self, settings: dict, history: np.ndarray) -> int:
        return self._sampler(self._address, settings, history)
