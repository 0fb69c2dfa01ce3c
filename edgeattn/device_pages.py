"""Pages that lie on a GPU: the same bytes as the host's, reached by copies."""
import numpy as np

from edgeattn.kernels_cuda import device, move_tokens
from edgeattn.kernels_cuda.page_pool import Pages
from edgeattn.page_formats import PageFormat


class DevicePages(Pages):
    """The counterpart of cache/pages.py's HostPages. Everything runs on `stream`, in the order of the calls that use the pages."""

    def __init__(self, page_format: PageFormat, count: int, stream):
        with stream:
            super().__init__(page_format, count)
        self._stream = stream

    def stored(self) -> dict[str, "Stored"]:
        return {name: Stored(array, self._stream) for name, array in self.arrays().items()}

    def written(self, numbers: np.ndarray) -> np.ndarray:
        """As HostPages.written."""
        return Stored(self.k[:, :self.format.delta_head], self._stream)[numbers]

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        with self._stream:
            source, target = (device.cupy().asarray(numbers, np.int64) for numbers in (source, target))
            for array in self.arrays().values():
                if array.size:
                    array[target] = array[source]

    def move(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """As HostPages.move, where a part is tokens in the order of the text, each of which goes to an earlier slot."""
        with self._stream:
            move_tokens.run(self, parts)

    def permute(self, turns: list[list[tuple[np.ndarray, np.ndarray]]]) -> None:
        """As HostPages.permute."""
        with self._stream:
            move_tokens.permute(self, turns)


class Stored:
    """Rows of an array on the device as NumPy arrays: what saves and loads sessions asks for."""

    def __init__(self, array, stream):
        self._array, self._stream = array, stream
        self.shape, self.dtype, self.itemsize = array.shape, array.dtype, array.itemsize

    def __getitem__(self, rows) -> np.ndarray:
        with self._stream:
            return self._array[rows if isinstance(rows, slice) else device.cupy().asarray(rows, np.int64)].get()

    def __setitem__(self, rows: np.ndarray, values: np.ndarray) -> None:
        xp = device.cupy()
        with self._stream:
            self._array[xp.asarray(rows, np.int64)] = xp.asarray(np.ascontiguousarray(values))
