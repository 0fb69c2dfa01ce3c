"""What kernels on a GPU read of one sequence: a copy of its page lists, and what page selection keeps from step to step."""
import numpy as np

from edgeattn.kernels_cpu.selections import SLOTS
from edgeattn.kernels_cuda import device

NEVER = np.iinfo(np.int32).max


class DeviceSequence:
    """The host's page lists are the truth: upload() brings the device what has changed since. Selections and their index are made and kept
    on the device alone; the host only says from which page on they are void. Counts travel with each call (device_batch.py).

    Attention mass is added up on the device and taken apart on the host, where tokens are dropped: fetch() brings it here, and the next
    upload() takes it there again. Slots that no token is in are zero there. So go how certain the last step was (`confidence`) and sums of
    values (`value_sums`), which forks take along. What stands for dropped tokens (`compensation`) changes here alone, and goes there with
    the same upload."""

    def __init__(self, sequence, stream):
        """sequence: a cache/sequence.py Sequence; only its arrays are held, so that it can be dropped."""
        xp = device.cupy()
        self._host, self._stream = sequence.tables, stream
        self._counts, self._compensation = sequence.counts, sequence.compensation
        self._fetched = {name: getattr(sequence, name) for name in ("mass", "confidence", "value_sums")}
        with stream:
            self._held = {"tables": xp.full(sequence.tables.shape, -1, np.int32)}
            for name in ("selection", "index", "indexed", "mass", "compensation", "confidence", "value_sums"):
                array = getattr(sequence, name)
                if array is not None:
                    self._held[name] = xp.zeros(array.shape, array.dtype)
        self._good = np.full(sequence.counts.shape, NEVER, np.int32)  # pages whose index is not void
        self._changed, self._void, self._rekeyed = (0, 0), False, False
        self._ahead, self._moved = set(), sequence.length > 0  # what has changed there; whether what is dropped has here
        if sequence.length:  # a fork: what was selected for the other one is made anew
            self.relisted(0, sequence.tables.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._held.values())

    def address(self, name: str) -> int:
        """Of an array of the sequence on the device; 0: there is none."""
        return self._held[name].data.ptr if name in self._held else 0

    def relisted(self, first: int, last: int) -> None:
        """Columns first ... last of the page lists have changed."""
        if first < last:
            low, high = self._changed
            self._changed = (min(low, first), max(high, last)) if low < high else (first, last)

    def void(self, head=..., page: int | np.ndarray = 0) -> None:
        self._good[head] = np.minimum(self._good[head], page)
        self._void = True
        self.fetch()
        if "value_sums" in self._held:
            self._fetched["value_sums"][head] = 0
        self._moved = True

    def rekeyed(self, heads: np.ndarray, pages: np.ndarray) -> None:
        np.minimum(self._good, pages, out=self._good, where=heads)
        self._rekeyed = True

    def fetch(self, slots: list[slice] | None = None) -> None:
        """Bring the sequence's arrays up to date, once what was enqueued is done; the mass of these slots alone, if any are given."""
        with self._stream:
            for name in self._ahead if slots is None else self._ahead & {"mass"}:
                for part in slots or [slice(None)]:
                    self._fetched[name][..., part] = self._held[name][..., part].get()
        if slots is None:
            self._ahead.clear()

    def reordered(self, slots: list[slice]) -> None:
        """Mass that was fetched has changed places here."""
        mass = self._mass()
        with self._stream:
            for part in slots:
                self._held["mass"][..., part] = device.cupy().asarray(np.ascontiguousarray(mass[..., part]))

    def _mass(self):
        """As the device is to have it: the host leaves what was in slots that hold nothing now."""
        mass = self._fetched["mass"]
        return np.where(np.arange(mass.shape[-1]) < self._counts[..., None], mass, np.float32(0))

    def upload(self, send, probes: bool) -> None:
        """send(rows, first, last, address): copies columns of rows of int32 to an array of the same shape on the device. probes: whether
        the call adds to mass."""
        first, last = self._changed
        if first < last:
            send(self._host.reshape(-1, self._host.shape[-1]), first, last, self.address("tables"))
            self._changed = 0, 0
        if self._void or self._rekeyed:
            xp = device.cupy()
            with self._stream:
                if self._void and "selection" in self._held:
                    self._held["selection"][..., SLOTS] = 0
                if "indexed" in self._held:
                    xp.minimum(self._held["indexed"], xp.asarray(self._good), out=self._held["indexed"])
            self._good[:], self._void, self._rekeyed = NEVER, False, False
        if self._moved:
            with self._stream:
                if "mass" in self._held:
                    self._held["mass"].set(self._mass())
                for name in {"confidence", "value_sums"} & self._held.keys():
                    self._held[name].set(self._fetched[name])
                if "compensation" in self._held:
                    self._held["compensation"].set(self._compensation)
            self._moved = False
        self._ahead |= {"mass" if probes else "", "confidence", "value_sums"} & self._held.keys()
