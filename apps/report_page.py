"""A report as one HTML file that asks for nothing else: no script, no font, no image."""
from pathlib import Path

from edgeattn.apps.report_figures import figures
from edgeattn.apps.report_tables import machines, tables
from edgeattn.apps.terminal import count, size

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(results: list[dict]) -> str:
    """The page of results of `edgeattn bench` and `edgeattn eval`, in the order of their files. Needs matplotlib."""
    from jinja2 import Environment, StrictUndefined
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    models = list(dict.fromkeys(result["model"] for result in results))
    return env.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(models), facts=facts(results), figures=figures(results), tables=tables(results),
        dates=sorted(result["date"][:10] for result in results))


def facts(results: list[dict]) -> list[tuple[str, str]]:
    """(name, text) of the machine and the model."""
    found = [("machine", "; ".join(machines(results))), ("edgeattn", ", ".join(sorted({result["edgeattn"] for result in results})))]
    bench = [result for result in results if result["kind"] == "bench"]
    if not bench:
        return found
    read = [row["read_bandwidth"] / 1e9 for row in bench]
    about = {f"{count(row['params'])} parameters, {size(row['size_bytes'])}" for row in bench}
    found += [("weights", "; ".join(sorted(about))), ("runs on", ", ".join(sorted({_where(row) for row in bench}))),
              ("memory reads", f"{min(read):.1f} to {max(read):.1f} GB/s" if max(read) - min(read) > 0.05 else f"{read[0]:.1f} GB/s")]
    told = {name: source for row in bench for name, source in row["sensors"].items() if source}
    silent = [name for row in bench for name in row["sensors"] if name not in told]
    found.append(("sensors", ", ".join(f"{name} from {source}" for name, source in told.items()) or "none"))
    if silent:
        found.append(("not told by this machine", ", ".join(dict.fromkeys(silent))))
    held = sum(bool(row["throttled"]) for row in bench)
    if "throttling" in told:
        found.append(("throttled", f"in {held} of {len(bench)} tests" if held else "never"))
    return found


def _where(row):
    return f"{row['threads']} threads" if row["device"] == "cpu" else row["device"]
