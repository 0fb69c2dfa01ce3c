"""The plots of a report: drawn by matplotlib as SVG whose colours are the page's, so that they follow a light or a dark scheme."""
import html
import io
import re
from dataclasses import dataclass

from edgeattn.apps.report_settings import commands, labels, speed, styles

WIDTH, HEIGHT = 4.4, 3.0  # inches: a phone shows letters about as they are
INK, GRID = "#fe00ff", "#fe00fe"                        # no colours, but names: the page says what they are
COLOURS = [f"#fe00{i:02x}" for i in range(8)]
DASHES = ("-", "--", ":", "-.")
PARTS = {"weights_mapped_bytes": "weights, mapped", "kv_bytes": "KV cache", "workspace_bytes": "workspace", "runtime_bytes": "runtime"}
MIB = 2**20


@dataclass
class Figure:
    """A plot: what it shows, its SVG, [(colour, whether dashed, text)] of its legend, the commands that measured it, a note."""
    title: str
    svg: str
    legend: list[tuple[str, bool, str]]
    commands: list[str]
    note: str = ""


def figures(results: list[dict]) -> list[Figure]:
    """Every plot that the results are enough for."""
    bench = [result for result in results if result["kind"] == "bench"]
    evals = [result for result in results if result["kind"] == "eval"]
    bench = [row | {"speed": speed(row)} for row in bench]
    generated = [row for row in bench if row["n_gen"] and not row["n_prompt"]]
    prompts = [row for row in bench if row["n_prompt"] and not row["n_gen"]]
    found = [
        *_each("Generation", "tokens a second", generated, "speed", "One token at a time, after so many others: the median of the "
               "repetitions, and each one as a dot."),
        *_each("Prompts", "tokens a second", prompts, "speed", "A prompt of {n_prompt} tokens after so many others."),
        *_each("Time of a token, 95th percentile", "ms", generated, "p95_ms", "One in 20 tokens takes longer."),
        *_each("Time to first token", "ms", prompts, "ttft_ms", "Of a prompt of {n_prompt} tokens after so many others."),
        *_each("Share of the memory's bandwidth", "%", [row | {"share": 100 * row["bandwidth_share"]} for row in generated], "share",
               "Weights and cache that generation reads, of what plain reads of its memory reach on this machine. What fits the "
               "processor's caches may pass 100 %."),
        _memory(generated or prompts),
        _cache(generated),
        *_each("Energy of a generated token", "J", [row for row in generated if row["joules_per_token"] is not None], "joules_per_token",
               "From what the machine's power sensors tell."),
        *(_pareto(task, depth, [one for one in evals if (one["task"], one["depth"]) == (task, depth)])
          for task, depth in dict.fromkeys((one["task"], one["depth"]) for one in evals))]
    return [figure for figure in found if figure]


def _axes(y, x="", height=HEIGHT):
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context(inks | {"font.size": 9, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.axisbelow": True}):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes = canvas.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(True, linewidth=0.6)
    return canvas, axes


def _svg(canvas, name):
    """Inline SVG: its colours the page's, its ids its own, nothing in it that points elsewhere."""
    from matplotlib import rc_context
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    box = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', text)
    text = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(name)}">{text[box.end():]}'
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{i})")
    prefix = re.sub(r"\W+", "-", name.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{prefix}-', text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text)


def _legend(texts, marks=None):
    """marks: (colour, dash) of each text."""
    marks = marks or [(i, 0) for i in range(len(texts))]
    return [(f"var(--c{colour % len(COLOURS)})", bool(dash), text) for text, (colour, dash) in zip(texts, marks)]


def _each(title, unit, rows, field, note):
    """A plot for each number of tokens that was timed: they are not to compare."""
    kinds = dict.fromkeys(row["n_prompt"] + row["n_gen"] for row in rows)
    return [_lines(f"{title}, {n} tokens" if len(kinds) > 1 else title, unit,
                   [row for row in rows if row["n_prompt"] + row["n_gen"] == n], field, note) for n in kinds]


def _lines(title, unit, rows, field, note):
    """A value over depth, a line for each setting."""
    if not rows or len({row["depth"] for row in rows}) < 2:
        return None
    canvas, axes = _axes(unit, "tokens in the cache")
    names = labels(rows)
    marks = styles(list(names.values()))
    for place, (colour, dash) in zip(names, marks):
        own = sorted((row for row in rows if (row["model"], row["setting"]) == place), key=lambda row: row["depth"])
        axes.plot([row["depth"] for row in own], [row[field] for row in own], color=COLOURS[colour % 8], linestyle=DASHES[dash % 4],
                  marker="o", markersize=3.5, linewidth=1.6)
        if field == "speed":
            for row in own:
                axes.plot([row["depth"]] * len(row["samples_s"]), [(row["n_prompt"] + row["n_gen"]) / s for s in row["samples_s"]], ".",
                          color=COLOURS[colour % 8], markersize=2.5, alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    return Figure(title, _svg(canvas, title), _legend(names.values(), marks), commands(rows),
                  note.format(**rows[0]))


def _deepest(rows):
    """Of each setting the row with most in the cache."""
    found = {}
    for row in rows:
        place = row["model"], row["setting"]
        if place not in found or row["depth"] + row["n_gen"] >= found[place]["depth"] + found[place]["n_gen"]:
            found[place] = row
    return list(found.values())


def _bars(axes, names):
    axes.set_yticks(range(len(names)), [""] * len(names))
    for i, name in enumerate(names):
        axes.annotate(name, (0, i), (2, 10), textcoords="offset points", fontsize=8.5, va="center", color=INK)
    axes.set_ylim(len(names) - 0.6, -0.8)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _memory(rows):
    rows = [row for row in _deepest(rows) if row["device"] == "cpu"]
    if not rows:
        return None
    canvas, axes = _axes("", "MiB", 0.7 + 0.48 * len(rows))
    left = [0.0] * len(rows)
    for i, name in enumerate(PARTS):
        sizes = [row[name] / MIB for row in rows]
        axes.barh(range(len(rows)), sizes, 0.3, left, color=COLOURS[i])
        left = [a + b for a, b in zip(left, sizes)]
    _bars(axes, labels(rows).values())
    return Figure("Memory", _svg(canvas, "Memory"), _legend(PARTS.values()), commands(rows),
                  f"Of the process at its peak, after {max(row['depth'] for row in rows):,} tokens; runtime is Python, libraries, "
                  "compiled code.")


def _cache(rows):
    rows = _deepest(rows)
    if not rows:
        return None
    canvas, axes = _axes("", "MiB", 0.7 + 0.48 * len(rows))
    axes.barh(range(len(rows)), [row["kv_bytes"] / MIB for row in rows], 0.3, color=COLOURS[0], alpha=0.4)
    axes.barh(range(len(rows)), [row["kv_bytes_per_token"] / MIB for row in rows], 0.15, color=COLOURS[1])
    _bars(axes, labels(rows).values())
    return Figure("Keys and values", _svg(canvas, "Keys and values"), _legend(["kept", "read for a generated token"]),
                  commands(rows), f"After {max(row['depth'] for row in rows):,} tokens.")


def _pareto(task, depth, records):
    """Score over the bytes of the cache. A line joins what no other setting beats in both."""
    records = [one for one in records if one.get("kv_bytes") and one["score"] is not None]
    records = [one for i, one in enumerate(records) if not any(_coincide(one, other) for other in records[:i])]
    if len(records) < 2:
        return None
    more = records[0].get("unit", "%").startswith("%")
    scale, unit = (100, records[0].get("unit", "% right")) if more else (1, records[0].get("unit", "score"))
    canvas, axes = _axes(f"{task}, {unit}", "MiB of keys and values")
    names = labels(records)
    for i, one in enumerate(records):
        x, y = one["kv_bytes"] / MIB, scale * one["score"]
        if one["low"] is not None:
            axes.plot([x, x], [scale * one["low"], scale * one["high"]], color=COLOURS[i % 8], linewidth=1, alpha=0.6)
        axes.plot(x, y, "osD^"[i // 8 % 4], color=COLOURS[i % 8], markersize=6)
    front, best = [], None
    for one in sorted(records, key=lambda one: (one["kv_bytes"], -one["score"] if more else one["score"])):
        if best is None or (one["score"] > best if more else one["score"] < best):
            front.append(one)
            best = one["score"]
    axes.plot([one["kv_bytes"] / MIB for one in front], [scale * one["score"] for one in front], color=INK, linewidth=0.8, alpha=0.5,
              zorder=0)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    title = f"Quality: {task}, {depth:,} tokens"
    text = f"{records[0]['samples']} samples" + ("; 95 % intervals" if records[0]["low"] is not None else "")
    return Figure(title, _svg(canvas, title), _legend(names.values()), commands(records),
                  f"{text}. {'More' if more else 'Less'} is better; the line joins what no other setting beats in both. Settings that "
                  "coincide with one before are in the table only.")


def _coincide(one, other):
    return one["score"] == other["score"] and abs(one["kv_bytes"] / other["kv_bytes"] - 1) < 0.05
