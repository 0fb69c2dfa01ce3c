"""The rows of a benchmark as Markdown, CSV, JSON or JSON lines, each written as soon as it is measured."""
import csv
import json
from dataclasses import asdict, dataclass, fields

from edgeattn.apps.terminal import count, size


@dataclass
class Row:
    """One test. Rates and times are over all repetitions; what a kind of test does not measure stays None."""
    model: str
    size_bytes: int
    params: int
    threads: int
    kv_type: str
    ubatch: int
    test: str
    repetitions: int
    tokens_per_second: float
    deviation: float
    peak_rss_bytes: int
    kv_bytes: int                # pages in use at the end of a repetition
    weight_bytes_per_token: int
    read_bandwidth: float        # bytes per second that plain reads reach on this machine; on a GPU, reads and writes of a copy
    ttft_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    kv_bytes_per_token: int | None = None
    bandwidth: float | None = None        # bytes per second of weights and cache that decode reads
    bandwidth_share: float | None = None  # of read_bandwidth
    device: str = "cpu"


def _maybe(text, value):
    return "" if value is None else text.format(value)


COLUMNS = {  # heading -> width, text
    "model": (14, lambda r: r.model),
    "size": (9, lambda r: size(r.size_bytes)),
    "params": (7, lambda r: count(r.params)),
    "threads": (7, lambda r: str(r.threads) if r.device == "cpu" else r.device),
    "test": (13, lambda r: r.test),
    "t/s": (15, lambda r: f"{r.tokens_per_second:.2f} ± {r.deviation:.2f}"),
    "TTFT ms": (7, lambda r: _maybe("{:.1f}", r.ttft_ms)),
    "p50 ms": (6, lambda r: _maybe("{:.2f}", r.p50_ms)),
    "p95 ms": (6, lambda r: _maybe("{:.2f}", r.p95_ms)),
    "peak RSS": (9, lambda r: size(r.peak_rss_bytes)),
    "KV": (9, lambda r: size(r.kv_bytes)),
    "weights/token": (13, lambda r: size(r.weight_bytes_per_token)),
    "GB/s": (5, lambda r: _maybe("{:.1f}", r.bandwidth and r.bandwidth / 1e9)),
    "of read": (7, lambda r: _maybe("{:.0%}", r.bandwidth_share)),
}


class Markdown:
    """A table that lines up in a terminal too."""

    def __init__(self, file):
        self._file = file
        self._line([name.ljust(width) for name, (width, _) in COLUMNS.items()])
        self._line(["-" * (width - 1) + (":" if i else "-") for i, (width, _) in enumerate(COLUMNS.values())])

    def _line(self, cells):
        print("| " + " | ".join(cells) + " |", file=self._file, flush=True)

    def add(self, row: Row) -> None:
        self._line([text(row).rjust(width) if i else text(row).ljust(width) for i, (width, text) in enumerate(COLUMNS.values())])

    def close(self) -> None:
        pass


class Csv:
    """Every field of Row, a line each."""

    def __init__(self, file):
        self._file, self._writer = file, csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        self._writer.writeheader()

    def add(self, row: Row) -> None:
        self._writer.writerow(asdict(row))
        self._file.flush()

    def close(self) -> None:
        pass


class JsonLines:
    """An object a line."""

    def __init__(self, file):
        self._file = file

    def add(self, row: Row) -> None:
        print(json.dumps(asdict(row)), file=self._file, flush=True)

    def close(self) -> None:
        pass


class Json:
    """One list; its brackets and commas are written as rows come."""

    def __init__(self, file):
        self._file, self._rows = file, 0

    def add(self, row: Row) -> None:
        print(",\n" if self._rows else "[\n", json.dumps(asdict(row)), sep="", end="", file=self._file, flush=True)
        self._rows += 1

    def close(self) -> None:
        print("\n]" if self._rows else "[]", file=self._file, flush=True)


FORMATS = {"md": Markdown, "json": Json, "csv": Csv, "jsonl": JsonLines}


def make_report(name: str, file):
    """A report that writes to `file`: add(row) for each row, then close()."""
    return FORMATS[name](file)
