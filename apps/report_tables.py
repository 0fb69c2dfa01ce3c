"""The results of a report as tables: headings and cells as text, for the page and for Markdown."""
from dataclasses import dataclass

from edgeattn.apps.report_settings import commands, labels, speed
from edgeattn.apps.table import markdown as rows_of
from edgeattn.apps.terminal import size


@dataclass
class Table:
    """Cells of text; all columns but the first are numbers."""
    title: str
    heads: list[str]
    rows: list[list[str]]
    commands: list[str]


def tables(results: list[dict], brief: bool = False) -> list[Table]:
    """Speed and memory, then quality; no table without results. brief: of speed a row for each setting, not for each depth."""
    bench = [result for result in results if result["kind"] == "bench"]
    evals = [result for result in results if result["kind"] == "eval"]
    found = []
    for test in dict.fromkeys((row["n_prompt"], row["n_gen"]) for row in bench):
        found.append((_by_depth if brief else _bench)(*test, [row for row in bench if (row["n_prompt"], row["n_gen"]) == test]))
    for task, depth in dict.fromkeys((one["task"], one["depth"]) for one in evals):
        found.append(_quality(task, depth, [one for one in evals if (one["task"], one["depth"]) == (task, depth)]))
    return found


def _title(n_prompt, n_gen):
    parts = [text.format(n) for text, n in (("a prompt of {} tokens", n_prompt), ("{} generated tokens", n_gen)) if n]
    return " and ".join(parts).capitalize()


def _by_depth(n_prompt, n_gen, rows):
    """Tokens a second at each depth, and what the deepest takes."""
    names, depths = labels(rows), sorted({row["depth"] for row in rows})
    heads, cells = ["setting", *(f"at {depth:,}" for depth in depths), "KV cache", *(["read/token"] if n_gen else []), "peak RSS"], []
    for place, name in names.items():
        own = {row["depth"]: row for row in rows if (row["model"], row["setting"]) == place}
        last = own[max(own)]
        read = [size(last["weight_bytes_per_token"] + last["kv_bytes_per_token"])] if n_gen else []
        cells.append([name, *(f"{speed(own[depth]):.0f}" if depth in own else "" for depth in depths), size(last["kv_bytes"]),
                      *read, size(last["peak_rss_bytes"])])
    title = f"{_title(n_prompt, n_gen)}, tokens a second after so many in the cache (medians); memory at the last"
    return Table(title, heads, cells, commands(rows))


def _bench(n_prompt, n_gen, rows):
    names = labels(rows)
    columns = {"setting": lambda r: names[r["model"], r["setting"]], "depth": lambda r: f"{r['depth']:,}",
               "tokens/s": lambda r: f"{r['tokens_per_second']:.1f} ± {r['deviation']:.1f}"}
    if n_prompt:
        columns["TTFT, ms"] = lambda r: f"{r['ttft_ms']:.1f}"
    if n_gen:
        columns |= {"p50, ms": lambda r: f"{r['p50_ms']:.2f}", "p90": lambda r: f"{r['p90_ms']:.2f}", "p95": lambda r: f"{r['p95_ms']:.2f}",
                    "read/token": lambda r: size(r["weight_bytes_per_token"] + r["kv_bytes_per_token"]),
                    "of bandwidth": lambda r: f"{r['bandwidth_share']:.0%}"}
    columns |= {"KV cache": lambda r: size(r["kv_bytes"]), "peak RSS": lambda r: size(r["peak_rss_bytes"])}
    for name, field, form in (("°C", "celsius", ".0f"), ("MHz", "mhz", ".0f"), ("W", "watts", ".1f"),
                              ("J/token", "joules_per_token", ".3f")):
        if any(row[field] is not None and (field != "mhz" or row["sensors"].get("frequency") != "/proc/cpuinfo") for row in rows):
            columns[name] = lambda r, field=field, form=form: "" if r[field] is None else format(r[field], form)
    if any(row["throttled"] for row in rows):
        columns["throttled"] = lambda r: "yes" if r["throttled"] else ""
    cells = [[text(row) for text in columns.values()] for row in rows]
    return Table(_title(n_prompt, n_gen), list(columns), cells, commands(rows))


def _quality(task, depth, records):
    names, more = labels(records), list(dict.fromkeys(name for one in records for name in one["metrics"]))
    heads = ["setting", "KV cache", records[0].get("unit", "score"), "95 % interval", "samples", *more]
    percent = records[0].get("unit", "").startswith("%")
    rows = [[names[one["model"], one["setting"]], size(one["kv_bytes"]) if one.get("kv_bytes") else "", number(one["score"], percent),
             "" if one["low"] is None else f"{number(one['low'], percent)} to {number(one['high'], percent)}", str(one["samples"]),
             *(number(one["metrics"].get(name), percent or name == "same top") for name in more)] for one in records]
    return Table(f"{task}, {depth:,} tokens", heads, rows, commands(records))


def number(value: float | None, percent: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:z.1f} %" if percent else f"{value:.2f}" if abs(value) >= 10 else f"{value:z.4f}"


def machines(results: list[dict]) -> list[str]:
    return list(dict.fromkeys(result["machine"] for result in results))


def markdown(results: list[dict]) -> str:
    """The brief tables, the machine above them, and below each its commands."""
    parts = ["\n".join(machines(results))]
    for table in tables(results, brief=True):
        parts += [f"**{table.title}**", rows_of([table.heads, *table.rows]), "\n".join(f"`{command}`" for command in table.commands)]
    return "\n\n".join(parts)
