"""The tests of `edgeattn bench` on one loaded model."""
import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil

from edgeattn.apps import models, record
from edgeattn.apps.bench_report import Row, Trial
from edgeattn.apps.terminal import note
from edgeattn.apps.weights import Weights
from edgeattn.bandwidth import measured_apart
from edgeattn.cache.session import fingerprint
from edgeattn.generation import Sampler, SamplerOptions
from edgeattn.sensors import Reading, Sensors, merge

SEED = 1     # of the random tokens: every run computes the same ones
WARM_UP = 2  # tokens that are generated before a test


@dataclass
class Run:
    """One repetition: seconds of all of it, of its prompt, and of each token; what sensors told meanwhile."""
    seconds: float
    prompt_s: float
    token_s: list[float]
    reading: Reading


class Bench:
    """Runs tests one after another, on one sequence. Close it at the end."""

    def __init__(self, args: argparse.Namespace, ctx_size: int):
        """args: of one setting."""
        self._model, _ = models.load(args, ctx_size=ctx_size)
        self._args, self._random = args, np.random.default_rng(SEED)
        self._weights, self._first = Weights(self._model.folder), Sampler(SamplerOptions(temperature=0))
        self._sensors, self._kv_most = Sensors(gpu=self._model.device != "cpu"), 0
        self._say("measuring the memory bandwidth")
        self._bandwidth = measured_apart(self._model.threads) if self._model.device == "cpu" else self._model.backend.bandwidth()
        self._say("")

    @property
    def missing(self) -> str:
        """What no sensor of this machine tells, and why."""
        return ", ".join(f"{name} ({why})" for name, why in self._sensors.missing.items())

    def close(self) -> None:
        self._sensors.close()

    def _say(self, text):
        note(text)
        if self._args.progress and text and not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)

    def rows(self, tests: list[Trial]) -> Iterator[Row]:
        """A Row for each test. A depth is computed once for the tests that follow each other at it."""
        sequence = self._model.new_sequence()
        for test in tests:
            self._go_to(sequence, test.depth)
            if not self._args.no_warmup:
                self._once(sequence, Trial(test.depth, min(test.n_prompt, self._model.ubatch), min(test.n_gen, WARM_UP)))
                self._go_to(sequence, test.depth)
            time.sleep(self._args.delay)
            steps, runs = self._steps(), []
            for i in range(self._args.repetitions):
                self._say(f"{test.name}: {i + 1} of {self._args.repetitions}")
                runs.append(self._once(sequence, test))
                self._kv_most = max(self._kv_most, kv := self._model.kv_bytes())
                read = self._kv_read(sequence, test, steps)
                self._go_to(sequence, test.depth)
            self._say("")
            yield self._row(test, runs, kv, read)
        self._model.free(sequence)

    def _go_to(self, sequence, depth):
        """Take back what is beyond a depth, and compute what is missing: a quantised page that was cut, all where tokens were evicted."""
        if sequence.length > depth:
            self._model.truncate(sequence, depth)
        while sequence.length < depth:
            note(f"filling the cache to depth {depth}: {sequence.length}")
            self._model.forward([(sequence, self._tokens(min(self._model.ubatch, depth - sequence.length)))], logit_rows="none")

    def _tokens(self, n):
        return self._random.integers(0, self._model.vocab_size, n)

    def _once(self, sequence, test):
        """A prompt up to its first token, then tokens one by one; either may be none."""
        prompt, ids, token_s, prompt_s = self._tokens(test.n_prompt), self._tokens(test.n_gen), [], 0.0
        stop, begin = self._sensors.watch(), time.perf_counter()
        if len(prompt):
            row = self._model.forward([(sequence, prompt)], fetch=False)[-1]
            self._first(row, [])
            prompt_s = time.perf_counter() - begin
        for i in range(len(ids)):
            start = time.perf_counter()
            self._model.forward([(sequence, ids[i:i + 1])], fetch=False)
            self._model.wait()
            token_s.append(time.perf_counter() - start)
        return Run(time.perf_counter() - begin, prompt_s, token_s, stop())

    def _row(self, test, runs, kv, read):
        model, weights, reading = self._model, self._weights, merge([run.reading for run in runs])
        rates = [test.work / run.seconds for run in runs]
        joules, tokens = reading.joules, test.work * len(runs)
        row = Row(**record.common("bench", self._args, model), export=fingerprint(model.config)[:16],
                  size_bytes=weights.bytes, params=weights.params, device=model.device, threads=model.threads,
                  kv_type=model.cache.options.name, ubatch=model.ubatch, test=test.name, depth=test.depth,
                  n_prompt=test.n_prompt, n_gen=test.n_gen, repetitions=len(runs), tokens_per_second=statistics.mean(rates),
                  deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0, kv_bytes=kv, read_bandwidth=self._bandwidth,
                  weight_bytes_per_token=weights.token_bytes, **self._memory(test), mhz=reading.mhz, mhz_min=reading.mhz_min,
                  celsius=reading.celsius, throttled=reading.throttled, watts=reading.watts,
                  joules_per_token=None if joules is None else joules / tokens,
                  sensors={name: None for name in self._sensors.missing} | self._sensors.sources,
                  samples_s=[round(run.seconds, 7) for run in runs], token_ms=[round(1e3 * s, 3) for run in runs for s in run.token_s])
        if test.n_prompt:
            row.ttft_ms = 1e3 * statistics.mean(run.prompt_s for run in runs)
        if test.n_gen:
            row.p50_ms, row.p90_ms, row.p95_ms = (float(x) for x in np.percentile(row.token_ms, (50, 90, 95)))
            row.kv_bytes_per_token = read
            decode = sum(map(len, (run.token_s for run in runs))) / sum(s for run in runs for s in run.token_s)
            row.bandwidth = (weights.token_bytes + read) * decode
            row.bandwidth_share = row.bandwidth / self._bandwidth
        return row

    def _memory(self, test):
        """The peak of the process and its parts: what is no weight, no cache and no workspace is Python, libraries, compiled code."""
        model, peak, device = self._model, _peak_rss(), None
        chunk = max(1, min(model.ubatch, max(test.n_prompt, test.depth)))
        workspace = model.plan.touched_bytes({"tokens": chunk, "rows": 1, "sequences": 1, "probes": 0})
        mapped = _resident(model.folder) if model.device == "cpu" else 0
        if model.device != "cpu":
            device = model.memory()["device"]
        here = mapped + (self._kv_most + workspace if model.device == "cpu" else 0)
        return {"peak_rss_bytes": peak, "weights_mapped_bytes": mapped, "workspace_bytes": workspace, "device_bytes": device,
                "runtime_bytes": max(0, peak - here)}

    def _steps(self):
        """[dense, sparse] decode steps so far; what lists read is counted from now."""
        scheduler = self._model.scheduler
        if scheduler is None:
            return None
        scheduler.figures()
        return list(scheduler.steps)

    def _kv_read(self, sequence, test, before):
        """Bytes of keys and values that a decode step of a test read on average, its own among them."""
        if not test.n_gen:
            return None
        model, tokens = self._model, test.depth + test.n_prompt + (test.n_gen + 1) / 2
        cache, window = model.cache, model.config["model"]["window"]
        moved = cache.options.storage == "delta" or cache.plan.evicts
        dense = cache.touched_bytes(sequence) if moved else cache.read_bytes(min(tokens, window) if window else tokens)
        if before is None or model.scheduler.steps[1] == before[1]:
            return round(dense)
        whole, lists = (now - then for now, then in zip(model.scheduler.steps, before))
        sparse = dense * model.scheduler.figures()["read"]
        if sequence.index is not None:  # what pages are chosen by is read too
            sparse += len(model.scheduler.groups) * sequence.index[0].nbytes * tokens / (sequence.index.shape[2] * 32)
        return round((whole * dense + lists * sparse) / (whole + lists))


def _resident(folder):
    """Bytes of the mapped weights that lie in memory."""
    if not sys.platform == "linux":
        return (folder / "model.onnx.data").stat().st_size
    return sum(part.rss for part in psutil.Process().memory_maps() if part.path == str((folder / "model.onnx.data").resolve()))


def _peak_rss():
    """The most memory that the process has held, mapped weights included."""
    if sys.platform == "linux":  # maxrss would include what the process that started this one held
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
