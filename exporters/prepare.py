"""What comes before a quantised export: calibration text, the statistics of what it puts into every matrix, widths, folded scales."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeattn.exporters.calibration_text import SPOKEN, own_text, read_text
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder, build
from edgeattn.exporters.functions import functions
from edgeattn.exporters.mixed import average, load as load_mixed
from edgeattn.exporters.mixed.loss import loss
from edgeattn.exporters.quantisers import load
from edgeattn.exporters.survey import Survey
from edgeattn.exporters.weight_statistics import Calibration
from edgeattn.exporters.weights import WIDTHS, Formats

Tell = Callable[[str, int, int], None]


def prepare(source: Checkpoint, decoder: Decoder, formats: Formats, text: str | Path | None, mixed: str, folder: Path, report: dict,
            tell: Tell | None = None) -> tuple[Checkpoint, np.ndarray | None]:
    """Set what `formats`, which a first build of the graph has filled, needs to know about the model.

    text    calibration text, or None for the model's own; `folder` has the tokenizer, and room for a temporary export
    mixed   a file of `mixed`; "auto" takes "loss" when the precision is an average. What it did is added to `report`
    report  what edgeattn.json will say
    tell    called with (what, done, total)
    -> the checkpoint to export, which may be `source` with scales moved, and tokens [n] for measuring what mixed widths lose
    """
    tell, method, uniform = tell or (lambda *_: None), load(formats.quantiser), mixed == "auto" and formats.bits in (None, *WIDTHS)
    fold = getattr(method, "fold", None)
    if uniform and not (method.NEEDS_STATISTICS or fold):
        return source, None
    sequences, probe = _sequences(source, decoder, text, folder, report, tell), None
    if not uniform:
        survey = Survey(source, decoder, formats.stored, sequences, formats.quantiser, formats.group_size)
        probe, sequences = survey.probe, sequences[:-1] or sequences
        formats.widths, report["mixed"] = _choose(survey, mixed, formats.bits, tell)
    if fold:
        tell("moving scales", 0, 1)
        source = fold(source, decoder, Calibration(source, decoder, sequences).of,
                      lambda name: formats.widths.get(name) or int(formats.bits), formats.group_size)
    formats.statistics = Calibration(source, decoder, sequences, getattr(method, "NEEDS_HEADS", False)).of
    return source, probe


def _choose(survey, name, bits, tell):
    """{initializer: width}, and what edgeattn.json says about them."""
    name = "loss" if name == "auto" else name
    method = load_mixed(name)
    for need in dict.fromkeys((*method.NEEDS, "divergence")):
        getattr(survey, need)(lambda *done, need=need: tell(f"measuring {need} of weights", *done))
    widths = method.widths(survey.matrices, bits)
    return widths, {"method": name, "bits": average(survey.matrices, widths),
                    "predicted_kl": sum(loss(m, widths[m.name]) for m in survey.matrices)}


def _sequences(source, decoder, text, folder, report, tell):
    if text is not None:
        return read_text(text, folder, decoder.vocab_size, decoder.max_position)
    speaker, ctx_size = folder / "speaker", min(decoder.max_position, SPOKEN)
    try:
        speaker.mkdir()
        graph = build(decoder, source, Formats("int8", 32), ctx_size)
        graph.write(speaker, functions(graph.nodes), lambda *done: tell("writing 8-bit weights to say calibration text with", *done))
        about = {**report, "precision": "int8", "model": {**report["model"], "ctx_size": ctx_size}}
        (speaker / "edgeattn.json").write_text(json.dumps(about), encoding="utf-8")
        return own_text(speaker, lambda *done: tell("letting the model say calibration text", *done))
    finally:
        shutil.rmtree(speaker, ignore_errors=True)
