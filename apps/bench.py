"""edgeattn bench: rows like llama-bench's, with latency, memory and the share of the machine's bandwidth."""
import argparse
import statistics
import sys
import time
from dataclasses import dataclass

from edgeattn.apps import options
from edgeattn.apps.bench_report import FORMATS, Row, make_report
from edgeattn.apps.terminal import note

HELP = "measure prompt and generation speed, latency, memory and bandwidth"
SEED = 1  # of the random tokens: every run computes the same ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, name, default, text in (("-p", "--n-prompt", 512, "prompt lengths; 0 for none"),
                                      ("-n", "--n-gen", 128, "tokens to generate; 0 for none"),
                                      ("-d", "--n-depth", 0, "tokens in the cache before a test")):
        parser.add_argument(flag, name, type=options.numbers(0), default=[default], metavar="N[,N]", help=f"{text} ({default})")
    parser.add_argument("-r", "--repetitions", type=options.whole(1), default=5, metavar="N", help="times each test runs (5)")
    parser.add_argument("-o", "--output", choices=FORMATS, default="md", help="format of the rows (md)")
    options.add_model(parser)


def main(args: argparse.Namespace) -> int:
    tests = [("pp", n) for n in args.n_prompt if n] + [("tg", n) for n in args.n_gen if n]
    if not tests:
        raise ValueError("nothing to measure: give -p N or -n N above 0")
    longest = max(args.n_depth) + max(n for _, n in tests)
    from edgeattn.apps import models
    from edgeattn.runtime import read_config
    allowed = read_config(models.exported(args.model, args.precision))["model"]["ctx_size"]
    allowed = min(args.ctx_size or allowed, allowed)
    if longest > allowed:
        raise ValueError(f"depth {max(args.n_depth)} and {longest - max(args.n_depth)} tokens need a context of {longest}, "
                         f"there are {allowed}; lower -d, -p or -n{', or raise -c' if args.ctx_size else ''}")
    model, _ = models.load(args, ctx_size=args.ctx_size or longest)
    bench, report = Bench(model, args.repetitions), make_report(args.output, sys.stdout)
    for depth in args.n_depth:
        for row in bench.rows(depth, tests):
            report.add(row)
    report.close()
    return 0


@dataclass
class Run:
    """Seconds of one repetition: all of it, and each token's."""
    seconds: float
    token_s: list[float]
    kv_bytes: int


class Bench:
    """Runs the tests of one depth after another on one loaded model."""

    def __init__(self, model, repetitions: int):
        import numpy as np
        from edgeattn.apps.weights import Weights
        from edgeattn.bandwidth import measured_apart
        from edgeattn.generation import Sampler, SamplerOptions
        self._model, self._repetitions = model, repetitions
        self._random = np.random.default_rng(SEED)
        self._weights, self._first = Weights(model.folder), Sampler(SamplerOptions(temperature=0))
        note("measuring the memory bandwidth")
        self._bandwidth = measured_apart(model.threads) if model.device == "cpu" else model.backend.bandwidth()
        note("")

    def rows(self, depth: int, tests: list[tuple[str, int]]):
        """A Row for each test, at one depth; the depth is computed once, and each repetition is taken back."""
        sequence = self._model.new_sequence()
        self._warm_up(sequence)
        self._fill(sequence, depth)
        for kind, n in tests:
            runs = []
            for i in range(self._repetitions):
                note(f"{_name(kind, n, depth)}: {i + 1} of {self._repetitions}")
                runs.append((self._prompt if kind == "pp" else self._generate)(sequence, n))
                self._model.truncate(sequence, depth)
                self._fill(sequence, depth)  # a quantised page that was cut, or all where tokens were evicted
            note("")
            yield self._row(kind, n, depth, runs)
        self._model.free(sequence)

    def _fill(self, sequence, depth):
        while sequence.length < depth:
            note(f"filling the cache to depth {depth}: {sequence.length}")
            ids = self._tokens(min(self._model.ubatch, depth - sequence.length))
            self._model.forward([(sequence, ids)], logit_rows="none")

    def _tokens(self, n):
        return self._random.integers(0, self._model.vocab_size, n)

    def _warm_up(self, sequence):
        for n in (min(32, self._model.ctx_size), 1):
            self._model.forward([(sequence, self._tokens(n))])
            self._model.truncate(sequence, 0)

    def _prompt(self, sequence, n):
        """A prompt up to its first token."""
        ids, start = self._tokens(n), time.perf_counter()
        row = self._model.forward([(sequence, ids)], fetch=False)[-1]
        self._first(row, [])
        return Run(time.perf_counter() - start, [], self._model.kv_bytes())

    def _generate(self, sequence, n):
        ids, token_s, begin = self._tokens(n), [], time.perf_counter()
        for i in range(n):
            start = time.perf_counter()
            self._model.forward([(sequence, ids[i:i + 1])], fetch=False)
            self._model.wait()
            token_s.append(time.perf_counter() - start)
        return Run(time.perf_counter() - begin, token_s, self._model.kv_bytes())

    def _row(self, kind, n, depth, runs):
        model, weights = self._model, self._weights
        rates = [n / run.seconds for run in runs]
        row = Row(model=f"{model.config['architecture']} {model.config['precision']}", size_bytes=weights.bytes, params=weights.params,
                  device=model.device, threads=model.threads, kv_type=model.cache.options.name, ubatch=model.ubatch,
                  test=_name(kind, n, depth),
                  repetitions=len(runs),
                  tokens_per_second=statistics.mean(rates), deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
                  peak_rss_bytes=_peak_rss(), kv_bytes=max(run.kv_bytes for run in runs), weight_bytes_per_token=weights.token_bytes,
                  read_bandwidth=self._bandwidth)
        if kind == "pp":
            row.ttft_ms = 1e3 * statistics.mean(run.seconds for run in runs)
            return row
        import numpy as np
        row.p50_ms, row.p95_ms = (float(x) * 1e3 for x in np.percentile([s for run in runs for s in run.token_s], (50, 95)))
        row.kv_bytes_per_token = self._kv_read(depth + (n + 1) / 2)
        row.bandwidth = (weights.token_bytes + row.kv_bytes_per_token) * row.tokens_per_second
        row.bandwidth_share = row.bandwidth / self._bandwidth
        return row

    def _kv_read(self, tokens):
        """Bytes of keys and values that one decoded token reads with `tokens` in the cache, itself included."""
        about = self._model.config["model"]
        seen = min(tokens, about["window"]) if about["window"] else tokens
        return round(self._model.cache.read_bytes(seen))


def _name(kind, n, depth):
    return f"{kind}{n}" + (f" @ d{depth}" if depth else "")


def _peak_rss():
    """The most memory that the process has held, mapped weights included."""
    if sys.platform == "linux":  # maxrss would include what the process that started this one held
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
