"""What comes before a quantised export: calibration text, the statistics of what it puts into every matrix, widths, folded scales."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from edgeattn.exporters.calibration_text import SPOKEN, own_text, read_text
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder, build
from edgeattn.exporters.functions import functions
from edgeattn.exporters.quantisers import load
from edgeattn.exporters.weight_statistics import Calibration
from edgeattn.exporters.weights import Formats

Tell = Callable[[str, int, int], None]


def prepare(source: Checkpoint, decoder: Decoder, formats: Formats, text: str | Path | None, mixed: str, folder: Path, report: dict,
            tell: Tell | None = None) -> Checkpoint:
    """Set what `formats` needs to know about the model; returns the checkpoint to export, which may be `source` with scales moved.

    text    calibration text, or None for the model's own; `folder` has the tokenizer, and room for a temporary export
    report  what edgeattn.json will say
    tell    called with (what, done, total)
    """
    tell = tell or (lambda *_: None)
    method = load(formats.quantiser)
    if not method.NEEDS_STATISTICS:
        return source
    sequences = _sequences(source, decoder, text, folder, report, tell)
    formats.statistics = Calibration(source, decoder, sequences).of
    return source


def _sequences(source, decoder, text, folder, report, tell):
    if text is not None:
        return read_text(text, folder, decoder.vocab_size, decoder.max_position)
    speaker, ctx_size = folder / "speaker", min(decoder.max_position, SPOKEN)
    try:
        speaker.mkdir()
        graph = build(decoder, source, Formats("int8", 32), ctx_size)
        graph.write(speaker, functions(graph.nodes), lambda done, total: tell("writing 8-bit weights that can say calibration text", done, total))
        about = {**report, "precision": "int8", "model": {**report["model"], "ctx_size": ctx_size}}
        (speaker / "edgeattn.json").write_text(json.dumps(about), encoding="utf-8")
        return own_text(speaker, lambda done, total: tell("letting the model say calibration text", done, total))
    finally:
        shutil.rmtree(speaker, ignore_errors=True)
