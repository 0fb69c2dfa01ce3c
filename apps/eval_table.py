"""Records of `edgeattn eval` as Markdown tables: scores, and below them what else each task counted."""
from edgeattn.apps.table import markdown
from edgeattn.apps.terminal import size

HEADS = "task", "tokens", "model, setting", "KV cache", "samples", "score (95 %)", "against the first (95 %)"


def table(records: list[dict]) -> str:
    """Scores, those of a task and length side by side; then a table of metrics for each of these."""
    groups = [[record for record in records if (record["task"], record["depth"]) == place]
              for place in dict.fromkeys((record["task"], record["depth"]) for record in records)]
    parts = [markdown([HEADS, *(cells(record) for group in groups for record in group)])]
    for group in groups:
        names = list(dict.fromkeys(name for record in group for name in record["metrics"]))
        if names:
            rows = [[name, *(_metric(record, name) for record in group)] for name in names]
            parts.append(markdown([[f"{group[0]['task']}, {group[0]['depth']:,} tokens", *map(_setting, group)], *rows]))
    return "\n\n".join(parts)


def cells(record: dict) -> list[str]:
    kind, against = record["values"]["kind"], record["against"]
    return [record["task"], f"{record['depth']:,}", _setting(record), size(record["kv_bytes"]) if record["kv_bytes"] else "",
            str(record["samples"]), _between(*(_score(kind, record[name]) for name in ("score", "low", "high"))),
            "" if not against else change(kind, *(against[name] for name in ("difference", "low", "high")))]


def change(kind: str, value: float, low: float | None, high: float | None) -> str:
    """A difference of scores (Outcome.against), and its interval where there is one."""
    return _between(*(_change(kind, x) for x in (value, low, high)))


def _setting(record):
    return f"{record['model']} {record['setting']}".strip()


def _between(value, low, high):
    return f"{value} ({low} to {high})" if low else value


def _score(kind, value):
    if value is None:
        return ""
    return {"share": f"{100 * value:.1f} %", "quality": f"{100 * value:.1f} %", "perplexity": f"{value:.2f}"}.get(kind) or _number(value)


def _change(kind, value):
    if value is None:
        return ""
    return {"share": f"{100 * value:+.1f}", "quality": f"{100 * value:+.1f}", "perplexity": f"{100 * value:+.2f} %"}.get(kind) \
        or ("-" if value < 0 else "+") + _number(abs(value))


def _number(value):
    return f"{value:.4f}" if not value or abs(value) >= 1e-3 else f"{value:.1e}"


def _metric(record, name):
    if name not in record["metrics"]:
        return ""
    value = record["metrics"][name]
    if record["values"]["kind"] in ("share", "quality") or name == "same top":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if "perplexity" in name else _number(value)
