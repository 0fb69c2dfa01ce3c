"""Counters of the server, as JSON for the page and as Prometheus' text for /metrics."""
from collections import Counter, deque
from statistics import fmean

TEXT = """# HELP edgeattn_{name} {help}
# TYPE edgeattn_{name} {kind}
"""
HELP = {"requests_total": "Answers by how they ended.", "prompt_tokens_total": "Tokens of prompts.",
        "cached_tokens_total": "Tokens of prompts that were not computed again.", "completion_tokens_total": "Tokens generated.",
        "steps_total": "Forward calls.", "step_seconds_total": "Seconds in forward calls.",
        "time_to_first_token_seconds": "From a request to its first token.", "request_seconds": "From a request to its end.",
        "running": "Answers being computed.", "waiting": "Requests in the queue.", "kv_bytes": "Bytes of the KV cache in use.",
        "kept_sequences": "Finished sequences kept for reuse."}


def model_state(model) -> dict:
    """What the page shows of a model's cache and sparse attention."""
    return {"kv_bytes": model.kv_bytes(), "k_type": model.cache.options.k_type, "v_type": model.cache.options.v_type,
            "sparse_attention": list(model.scheduler.explain()) if model.scheduler else [model.dense_because or "off"],
            "sparse_prefill": list(model.prefill.explain()) if model.prefill else [model.whole_because or "off"]}


class Figures:
    def __init__(self):
        self._ends, self._totals, self._recent = Counter(), Counter(), deque(maxlen=50)
        self.last: dict | None = None

    def count(self, outcome: str) -> None:
        self._ends[outcome] += 1

    def stepped(self, seconds: float, tokens: list[int]) -> None:
        self._totals.update({"steps_total": 1, "step_seconds_total": seconds})
        decoded = tokens.count(1)
        if decoded:
            self._recent.append((decoded, seconds))

    def ended(self, run, piece) -> None:
        self.count(piece.finish_reason or "error")
        self._totals.update({"prompt_tokens_total": len(run.job.prompt), "cached_tokens_total": run.cached,
                             "completion_tokens_total": run.generated, "request_seconds_sum": run.ended - run.arrived,
                             "request_seconds_count": 1})
        if run.first_token:
            self._totals.update({"time_to_first_token_seconds_sum": run.first_token - run.arrived, "time_to_first_token_seconds_count": 1})
            self.last = {"ttft_s": run.first_token - run.arrived, "prompt_tokens": len(run.job.prompt), "cached_tokens": run.cached,
                         "completion_tokens": run.generated,
                         "tokens_per_second": (run.generated - 1) / (run.ended - run.first_token) if run.generated > 1 else 0.0}

    def status(self) -> dict:
        """tokens_per_second: of all answers together, over the newest steps; last: the newest finished answer."""
        recent = list(self._recent)
        seconds = sum(seconds for _, seconds in recent)
        return {"tokens_per_second": sum(tokens for tokens, _ in recent) / seconds if seconds else 0.0,
                "batch": fmean(tokens for tokens, _ in recent) if recent else 0.0, "last": self.last,
                "requests": dict(self._ends), **{name: self._totals[name] for name in ("prompt_tokens_total", "cached_tokens_total",
                                                                                      "completion_tokens_total")}}

    def prometheus(self, status: dict) -> str:
        """The text format of Prometheus, version 0.0.4."""
        found = []
        for name, text in HELP.items():
            kind = "gauge" if name in status and not name.endswith("_total") else "counter" if name.endswith("_total") else "summary"
            found.append(TEXT.format(name=name, help=text, kind=kind).rstrip("\n"))
            if name == "requests_total":
                found += [f'edgeattn_requests_total{{outcome="{outcome}"}} {count}' for outcome, count in sorted(dict(self._ends).items())]
            elif kind == "summary":
                found += [f"edgeattn_{name}_{part} {self._totals[f'{name}_{part}']}" for part in ("sum", "count")]
            else:
                found.append(f"edgeattn_{name} {status[name] if kind == 'gauge' else self._totals[name]}")
        return "\n".join(found) + "\n"
