"""Which threads, prompt chunks and instructions run a model fastest on this machine; what `edgeattn tune` writes to the device profile.

A candidate runs in a process beside the setting that is best so far, and the two take turns: what else the machine does disturbs both. It
is taken if the interval of the median ratio of their times says that one workload takes less than GAIN of the time, and none more than
LOSS. What was taken must then win once more against the defaults, as a whole.
"""
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

PROMPT, DECODED = 1024, 24  # tokens of a round: a prompt, and single tokens behind it
ROUNDS = 7, 60              # of a pair, at least, the fewest of which an interval as sure as SURE can be made, and at most
PATIENCE = 20.0             # seconds of a pair, after which more than the least are not begun
SURE = 0.98                 # that the median is in its interval
FUTILE = 3                  # rounds after which a candidate that cannot win is dropped
GAIN, LOSS = 0.98, 1.03     # of the other's time
CHUNKS = (256, 1024)        # besides the default


@dataclass(frozen=True)
class Setting:
    """threads; ubatch: tokens of a prompt computed at once; level: instructions (kernels_cpu)."""
    threads: int
    ubatch: int
    level: str


@dataclass(frozen=True)
class Duel:
    """What a pair took: {workload: (lowest, median, highest) ratio of the candidate's time to the other's}, and seconds of the other."""
    candidate: Setting
    against: Setting
    ratios: dict[str, tuple[float, float, float]]
    seconds: dict[str, float]
    taken: bool


@contextmanager
def at_level(level: str):
    """Processes that are started inside compile for these instructions: they read them when they import the kernels."""
    before = os.environ.get("EDGEATTN_SIMD")
    os.environ["EDGEATTN_SIMD"] = level
    try:
        yield
    finally:
        os.environ.pop("EDGEATTN_SIMD") if before is None else os.environ.update(EDGEATTN_SIMD=before)


class Worker:
    """A process with a model under a setting. ValueError: it cannot run there."""

    def __init__(self, folder, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(str(folder), setting, theirs), daemon=True)
        with at_level(setting.level):
            self._process.start()
        theirs.close()
        self._answer()

    def round(self) -> dict[str, float]:
        """Seconds of each workload."""
        self._pipe.send("round")
        return self._answer()

    def _answer(self):
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process that was to be timed ended by itself") from None
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(folder, setting, pipe):
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    try:
        rounds = _Rounds(folder, setting)
        rounds.run()  # what is compiled, and read from the file, at the first
        pipe.send({})
    except ValueError as error:
        pipe.send(str(error))
        return
    try:
        while pipe.recv():
            pipe.send(rounds.run())
    except EOFError:
        pass


class _Rounds:
    def __init__(self, folder, setting):
        import numpy as np
        from edgeattn.prefill_scheduler import PrefillOptions
        from edgeattn.runtime import Model
        from edgeattn.scheduler import SparseOptions
        self.model = Model.load(folder, ctx_size=PROMPT + DECODED, threads=setting.threads, ubatch=setting.ubatch,
                                sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
        prompt = min(PROMPT, self.model.ctx_size - DECODED)
        self.ids = np.random.default_rng(0).integers(0, self.model.vocab_size, prompt + DECODED)

    def run(self):
        model, prompt = self.model, self.ids[:-DECODED]
        sequence = model.new_sequence()
        model.forward([(sequence, prompt[:32])])  # threads that slept meanwhile
        model.truncate(sequence, 0)
        start = time.perf_counter()
        model.forward([(sequence, prompt)])
        read = time.perf_counter()
        for token in self.ids[-DECODED:]:
            model.forward([(sequence, [token])])
        end = time.perf_counter()
        model.free(sequence)
        return {"prompt": read - start, "decode": end - read}


# ---- the choice ------------------------------------------------------------------------------------------------------
def candidates(default: Setting, cores: int, levels: list[str], ctx_size: int) -> Iterator[tuple[str, object]]:
    """(field of Setting, value) besides the defaults, in the order in which they are tried. levels: of this machine, best first."""
    for threads in sorted({1, cores // 2, cores - 1, cores} - {0, default.threads}, reverse=True):
        yield "threads", threads
    for ubatch in CHUNKS:
        if ubatch != default.ubatch and ubatch <= ctx_size:
            yield "ubatch", ubatch
    lower = levels[levels.index(default.level) + 1:]
    if lower and lower[0] != "plain":  # the next one: wider registers may cost clock
        yield "level", lower[0]


def tune(default: Setting, tries: list[tuple[str, object]], worker: Callable[[Setting], Worker],
         progress: Callable[[str, int, int], None] | None = None) -> tuple[Setting, list[Duel]]:
    """-> (the fastest setting that was found, the default where nothing beats it, and every pair that was timed).
    progress(what, done, total)."""
    best, duels = default, []
    tell = progress or (lambda *_: None)
    for i, (name, value) in enumerate(tries):
        tell(f"{name} {value}", i, len(tries) + 1)
        other = replace(best, **{name: value})
        try:
            duels.append(duel(best, other, worker))
        except ValueError:  # it cannot run there
            continue
        best = other if duels[-1].taken else best
    if best != default:
        tell("the choice against the defaults", len(tries), len(tries) + 1)
        duels.append(duel(default, best, worker))
        best = best if duels[-1].taken else default
    return best, duels


def duel(current: Setting, candidate: Setting, worker: Callable[[Setting], Worker]) -> Duel:
    """Time the two."""
    times = turns((current, candidate), worker, lambda times, spent: len(times) >= ROUNDS[spent < PATIENCE] or _hopeless(times))
    found = {name: interval(values) for name, values in ratios(times).items()}
    seconds = {name: statistics.median(one[name] for one, _ in times) for name in found}
    return Duel(candidate, current, found, seconds, not _hopeless(times) and wins(found))


def turns(settings: tuple[Setting, Setting], worker: Callable[[Setting], Worker], enough: Callable[[list, float], bool]) -> list[tuple]:
    """Seconds of both settings' workloads, round by round, until enough(rounds so far, seconds that they took)."""
    pair, times = [], []
    try:
        for setting in settings:
            pair.append(worker(setting))
        start = time.monotonic()
        while not enough(times, time.monotonic() - start):
            found = {place: pair[place].round() for place in ((0, 1) if len(times) % 2 == 0 else (1, 0))}
            times.append((found[0], found[1]))
    finally:
        for one in pair:
            one.close()
    return times


def ratios(times: list) -> dict[str, list[float]]:
    """{workload: the second's time as a part of the first's, by round}."""
    return {name: [second[name] / first[name] for first, second in times] for name in times[0][0]}


def interval(values: list[float]) -> tuple[float, float, float]:
    """(lowest, median, highest): an interval of the median that asks nothing of the distribution: order statistics, as many left out at
    each end as chance allows. Of 12 values that is one, of 20 four."""
    ordered, n, out = sorted(values), len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(out + 2)) <= (1 - SURE) * 2 ** n:
        out += 1
    return ordered[out], statistics.median(ordered), ordered[-1 - out]


def wins(found: dict[str, tuple[float, float, float]]) -> bool:
    """Whether one workload is faster beyond noise, and none slower."""
    highest = [high for _, _, high in found.values()]
    return min(highest) < GAIN and max(highest) < LOSS


def _hopeless(times):
    """Whether nothing has become as much faster as it must so far, or something surely slower."""
    found = ratios(times) if len(times) >= FUTILE else {}
    return bool(found) and (min(map(statistics.median, found.values())) >= GAIN or any(interval(x)[0] > LOSS for x in found.values()))


def entry(setting: Setting, default: Setting, duels: list[Duel]) -> dict:
    """What the profile keeps for people."""
    return {"setting": asdict(setting), "default": asdict(default), "date": time.strftime("%Y-%m-%d"),
            "duels": [asdict(duel) for duel in duels]}
