"""Physical pages of one format: their memory, and who holds each one."""
import numpy as np

from edgeattn.kernels_cpu.page_pool import Pages
from edgeattn.page_formats import PAGE, PageFormat


class CacheFull(RuntimeError):
    """No free page is left; the caller frees a sequence, evicts, or stops."""


class HostPages(Pages):
    """Pages that the host can read and write. On a device the class of the same methods is device_pages.py's."""

    def stored(self) -> dict[str, np.ndarray]:
        """The arrays as whoever saves and loads pages sees them."""
        return self.arrays()

    def written(self, numbers: np.ndarray) -> np.ndarray:
        """[pages, delta_head] uint8: Theta of pages of deltas, and which blocks were written."""
        return self.k[numbers, :self.format.delta_head]

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        for array in self.arrays().values():
            array[target] = array[source]

    def move(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Tokens of pages of floats from places to places, 32 * page + slot in it; those of a part are all read before one is written."""
        item = np.uint16 if self.format.k_type == "f16" else np.float32
        k = self.k.view(item).reshape(-1, self.format.head_dim, PAGE)
        v = self.v.view(item).reshape(-1, PAGE, self.format.width)
        for sources, targets in parts:
            a, b, from_slot, to_slot = sources // PAGE, targets // PAGE, sources % PAGE, targets % PAGE
            k[b, :, to_slot] = k[a, :, from_slot]
            v[b, to_slot] = v[a, from_slot]

    def permute(self, turns: list[list[tuple[np.ndarray, np.ndarray]]]) -> None:
        """As move, one turn after the other, where the tokens of a part change places with each other."""
        for parts in turns:
            self.move(parts)


class PagePool:
    """`count` pages with reference counts. A page with one holder may be written; a shared one must be copied."""

    def __init__(self, page_format: PageFormat, count: int, make=HostPages):
        """make(page_format, count): memory for pages, on the device that computes with them."""
        self.pages, self.format = make(page_format, count), page_format
        self.references = np.zeros(count, np.int32)
        self._free, self._top = np.arange(count - 1, -1, -1, dtype=np.int32), count  # a stack: low numbers first, so that memory is
        #                                                                              touched gradually

    @property
    def used(self) -> int:
        return len(self.references) - self._top

    @property
    def free(self) -> int:
        return self._top

    @property
    def used_bytes(self) -> int:
        return self.used * self.format.page_bytes

    def allocate(self, count: int) -> np.ndarray:
        """[count] int32, each held once; neighbours where that can be."""
        if count > self._top:
            raise CacheFull(f"KV cache is full: {count} pages are needed, {self._top} of {len(self.references)} are free; raise "
                            "--ctx-size or --kv-budget, or shorten the text")
        found = self._free[self._top - count:self._top][::-1].copy()
        self._top -= count
        self.references[found] = 1
        return found

    def share(self, pages: np.ndarray) -> None:
        self.references[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One holder less of each; every page at most once."""
        self.references[pages] -= 1
        gone = pages[self.references[pages] == 0][::-1]
        self._free[self._top:self._top + len(gone)] = gone
        self._top += len(gone)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        self.pages.copy(source, target)
