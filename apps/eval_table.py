"""Records of `edgeattn eval` as a Markdown table."""
from edgeattn.apps.terminal import size

HEADS = "task", "tokens", "model, setting", "KV cache", "samples", "score (95 %)", "against the first (95 %)", "more"


def table(records: list[dict]) -> str:
    """One row a record, those of a task and length side by side."""
    order = list(dict.fromkeys((record["task"], record["depth"]) for record in records))
    rows = [cells(record) for place in order for record in records if (record["task"], record["depth"]) == place]
    widths = [max(map(len, column)) for column in zip(HEADS, *rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (HEADS, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ("-" if i in (0, 2, 7) else ":") for i, width in enumerate(widths)) + "|")
    return "\n".join(lines)


def cells(record: dict) -> list[str]:
    kind, against = record["values"]["kind"], record["against"]
    more = "; ".join(f"{name} {_metric(kind, name, value)}" for name, value in record["metrics"].items())
    return [record["task"], f"{record['depth']:,}", f"{record['model']} {record['setting']}".strip(), size(record["kv_bytes"]),
            str(record["samples"]), _between(*(_score(kind, record[name]) for name in ("score", "low", "high"))),
            "" if not against else _between(*(_change(kind, against[name]) for name in ("difference", "low", "high"))), more]


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
    return f"{value:.4f}" if not value or value >= 1e-3 else f"{value:.1e}"


def _metric(kind, name, value):
    if kind in ("share", "quality") or name == "same top":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if "perplexity" in name else _number(value)
