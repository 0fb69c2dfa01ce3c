"""The rows of a benchmark as Markdown, CSV, JSON, JSON lines or a page; all but the page as they are measured."""
import csv
import json
from dataclasses import asdict, dataclass, field, fields

from edgeattn.apps.table import line, rule
from edgeattn.apps.terminal import count, size


@dataclass(frozen=True)
class Trial:
    """A prompt of n_prompt tokens and then n_gen to generate, either 0, after `depth` tokens."""
    depth: int
    n_prompt: int
    n_gen: int

    @property
    def work(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def tokens(self) -> int:
        return self.depth + self.work

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """From how `str` writes it."""
        return cls(*map(int, text.split(":")))

    def __str__(self) -> str:
        return f"{self.depth}:{self.n_prompt}:{self.n_gen}"

    @property
    def name(self) -> str:
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass
class Row:
    """One test of one setting. Rates and times are over all repetitions, whose samples are all kept; what a kind of test does not measure,
    or no sensor tells, stays None."""
    kind: str                    # "bench"
    model: str
    setting: str                 # flags, as text
    command: str
    machine: str
    date: str
    edgeattn: str                # version, of the code too
    export: str                  # a hash of the model's files
    size_bytes: int
    params: int
    device: str
    threads: int
    kv_type: str
    ubatch: int
    test: str
    depth: int
    n_prompt: int
    n_gen: int
    repetitions: int
    tokens_per_second: float     # of prompt and generated tokens together
    deviation: float
    peak_rss_bytes: int          # of the process so far: the depths before are in it
    weights_mapped_bytes: int    # of it, the weight file
    workspace_bytes: int         # of it, values between operators
    runtime_bytes: int           # of it, what is left when the cache at its fullest is taken off too: Python, libraries, compiled code
    kv_bytes: int                # of the cache at the end of a repetition: pages in use, lists, what is kept for each token
    weight_bytes_per_token: int
    read_bandwidth: float        # bytes per second that plain reads reach on this machine; on a GPU, reads and writes of a copy
    device_bytes: int | None = None       # of a GPU's memory, all that the process took
    ttft_ms: float | None = None          # of the prompt, up to its first token
    p50_ms: float | None = None           # of the time of each generated token
    p90_ms: float | None = None
    p95_ms: float | None = None
    kv_bytes_per_token: int | None = None  # of keys and values that a decode step reads
    bandwidth: float | None = None        # bytes per second of weights and cache that decode reads
    bandwidth_share: float | None = None  # of read_bandwidth
    mhz: float | None = None
    mhz_min: float | None = None
    celsius: float | None = None          # the hottest sensor at its hottest
    throttled: bool | None = None         # whether heat or power held clocks down meanwhile
    watts: float | None = None
    joules_per_token: float | None = None
    sensors: dict[str, str | None] = field(default_factory=dict)  # what each of the above was read from
    samples_s: list[float] = field(default_factory=list)          # seconds of each repetition
    token_ms: list[float] = field(default_factory=list)           # of each generated token, repetition after repetition


def _maybe(text, value):
    return "" if value is None else text.format(value)


COLUMNS = {  # heading -> width, text
    "model": (14, lambda r: r.model),
    "size": (9, lambda r: size(r.size_bytes)),
    "params": (7, lambda r: count(r.params)),
    "threads": (7, lambda r: str(r.threads) if r.device == "cpu" else r.device),
    "setting": (7, lambda r: r.setting or "defaults"),
    "test": (13, lambda r: r.test),
    "t/s": (17, lambda r: f"{r.tokens_per_second:.2f} ± {r.deviation:.2f}"),
    "TTFT ms": (7, lambda r: _maybe("{:.1f}", r.ttft_ms)),
    "p50 ms": (6, lambda r: _maybe("{:.2f}", r.p50_ms)),
    "p90 ms": (6, lambda r: _maybe("{:.2f}", r.p90_ms)),
    "p95 ms": (6, lambda r: _maybe("{:.2f}", r.p95_ms)),
    "peak RSS": (9, lambda r: size(r.peak_rss_bytes)),
    "KV": (9, lambda r: size(r.kv_bytes)),
    "KV/token": (9, lambda r: "" if r.kv_bytes_per_token is None else size(r.kv_bytes_per_token)),
    "weights/token": (13, lambda r: size(r.weight_bytes_per_token)),
    "GB/s": (5, lambda r: _maybe("{:.1f}", r.bandwidth and r.bandwidth / 1e9)),
    "of read": (7, lambda r: _maybe("{:.0%}", r.bandwidth_share)),
    "°C": (4, lambda r: _maybe("{:.0f}", r.celsius)),
    "MHz": (9, lambda r: _maybe("{:.0f}", r.mhz) + (" slowed" if r.throttled else "")),
    "W": (5, lambda r: _maybe("{:.1f}", r.watts)),
    "J/token": (7, lambda r: _maybe("{:.3f}", r.joules_per_token)),
}


class Markdown:
    """A table that lines up in a terminal too. Its columns are chosen when the first row comes: of sensors those that are there."""

    def __init__(self, file, settings, tests):
        self._file, self._settings, self._columns = file, max(map(len, settings), default=0), None
        self._least = {"setting": self._settings, "test": max(map(len, tests), default=0)}

    def _begin(self, row):
        known = {"setting": self._settings, "°C": row.celsius, "MHz": row.mhz and row.sensors.get("frequency") != "/proc/cpuinfo",
                 "W": row.watts, "J/token": row.watts}
        self._columns = {name: text for name, (_, text) in COLUMNS.items() if known.get(name, True)}
        self._widths = [max(COLUMNS[name][0], self._least.get(name, 0)) for name in self._columns]
        print(line(list(self._columns), self._widths), rule(self._widths), sep="\n", file=self._file)

    def add(self, row: Row) -> None:
        if self._columns is None:
            self._begin(row)
        print(line([text(row) for text in self._columns.values()], self._widths), file=self._file, flush=True)

    def close(self) -> None:
        pass


class Csv:
    """Every field of Row that is one value, a line each."""

    def __init__(self, file, settings, tests):
        names = [one.name for one in fields(Row) if one.name not in ("sensors", "samples_s", "token_ms")]
        self._file, self._writer = file, csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        self._writer.writeheader()

    def add(self, row: Row) -> None:
        self._writer.writerow(asdict(row))
        self._file.flush()

    def close(self) -> None:
        pass


class JsonLines:
    """An object a line."""

    def __init__(self, file, settings, tests):
        self._file = file

    def add(self, row: Row) -> None:
        print(json.dumps(asdict(row)), file=self._file, flush=True)

    def close(self) -> None:
        pass


class Json:
    """One list; its brackets and commas are written as rows come."""

    def __init__(self, file, settings, tests):
        self._file, self._rows = file, 0

    def add(self, row: Row) -> None:
        print(",\n" if self._rows else "[\n", json.dumps(asdict(row)), sep="", end="", file=self._file, flush=True)
        self._rows += 1

    def close(self) -> None:
        print("\n]" if self._rows else "[]", file=self._file, flush=True)


class Html:
    """A page, written at the end."""

    def __init__(self, file, settings, tests):
        from edgeattn.apps.report import need_plots
        need_plots()
        self._file, self._rows = file, []

    def add(self, row: Row) -> None:
        self._rows.append(asdict(row))

    def close(self) -> None:
        from edgeattn.apps.report_page import render
        if self._rows:
            print(render(self._rows), file=self._file)


FORMATS = {"md": Markdown, "json": Json, "csv": Csv, "jsonl": JsonLines, "html": Html}


def make_report(name: str, file, settings: list[str], tests: list[str]):
    """A report that writes to `file`: add(row) for each row, then close(). settings: those that will come, if there are several;
    tests: their names."""
    return FORMATS[name](file, settings, tests)
