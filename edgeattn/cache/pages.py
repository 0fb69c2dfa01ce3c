"""Physical pages: who holds each one."""
import numpy as np


class CacheFull(RuntimeError):
    """No free page is left; the caller frees a sequence, evicts, or stops."""


class PagePool:
    """Reference counts over `num_pages` physical pages. A page with one holder may be written; a shared one must be copied."""

    def __init__(self, num_pages: int):
        self.references = np.zeros(num_pages, np.int32)
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first, so that memory is touched gradually

    @property
    def used(self) -> int:
        return len(self.references) - len(self._free)

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        if not self._free:
            raise CacheFull(f"KV cache is full: all {len(self.references)} pages are in use; raise --ctx-size or shorten the text")
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, page: int) -> int:
        self.references[page] += 1
        return page

    def release(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            self._free.append(page)
