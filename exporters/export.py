"""A Hugging Face checkpoint to our folder: graph, streamed weights, tokenizer files, edgeattn.json."""
import glob
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import psutil

from edgeattn.exported import MOST_TEXT
from edgeattn.exporters.check import check, divergence, sha256
from edgeattn.exporters.checkpoint import open_checkpoint
from edgeattn.exporters.decoder import build
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.functions import functions
from edgeattn.exporters.mixed import load as load_mixed
from edgeattn.exporters.prepare import prepare
from edgeattn.exporters.targets import target_defaults
from edgeattn.exporters.weights import Formats, bits_of

FORMAT_VERSION = 1
LONGEST_CTX = 32768
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
          "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")


def export(checkpoint: str | Path, folder: str | Path, precision: str | None = None, group_size: int = 32, target: str = "generic",
           ctx_size: int | None = None, progress: Callable[[int, int], None] | None = None, quantiser: str = "auto",
           calibration: str | Path | None = None, mixed: str = "auto", preparing: Callable[[str, int, int], None] | None = None,
           ternary_layout: str = "panels", allow_requantize: bool = False) -> dict:
    """Export a checkpoint folder or a GGUF file; returns what was written to edgeattn.json.

    precision   "int2", "int3", "int4", "int8", "fp16", "fp32", or an average of bits as "int3.25"; of a checkpoint with ternary weights,
                which stay as they are, "ternary", "fp16" or "fp32". By default "int4" or "ternary". The embedding and the head of intN and
                of "ternary" have 8 bits
    group_size  weights of one output that share a scale: 16, 32, 64, 128 or 256
    ternary_layout  of ternary weights, "panels", "sparse" or "dense": see `weights.TERNARY_LAYOUTS`
    target      a name in `targets.TARGETS`: sets recorded defaults only
    ctx_size    rows of the rotary tables; by default the model's own limit, at most 32768
    progress    called with (bytes written, bytes in all)
    quantiser   a file of `quantisers`; "auto" takes "gptq" below 4 bits or with a calibration text, "rtn" otherwise
    calibration UTF-8 text for quantisers that need one and for `mixed`; without it the model says some itself
    mixed       a file of `mixed`, which gives every matrix its width so that the precision is the average; "auto" takes "loss" when
                the precision is no width of its own
    preparing   called with (what, done, total) before anything is written
    allow_requantize  weights that are codes already are rounded again as if they were floats. Without, they stay as they are where a
                format of ours can hold them; `requantised` in what is returned names those that did not
    ValueError for what the user can mend; nothing half-written stays behind then.
    """
    source, folder = open_checkpoint(checkpoint), Path(folder).resolve()
    decoder = read_architecture(source)
    precision = _precision(source, precision)
    formats = Formats(precision, group_size, settle_quantiser(quantiser, precision, calibration, mixed), ternary_layout=ternary_layout,
                      requantise=allow_requantize)
    defaults = target_defaults(target, precision)
    ctx_size = ctx_size or min(decoder.max_position, LONGEST_CTX)
    if not 1 <= ctx_size <= decoder.max_position:
        raise ValueError(f"ctx_size must be 1 to {decoder.max_position} (max_position_embeddings of the model), got {ctx_size}")
    _check_replaceable(folder)
    graph = build(decoder, source, formats, ctx_size)
    if formats.bits and not formats.stored and (formats.bits not in (4, 8) or calibration or (quantiser, mixed) != ("auto", "auto")):
        raise ValueError(f"{source.folder}: its weights are codes already, and kept, so there is nothing to round; leave --bits and the "
                         "like out, or give --allow-requantize to round the codes again, which loses more than rounding floats")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    remove_abandoned(folder.parent, f"{folder.name}.")
    try:
        work.mkdir()
        source.copy_files(COPIED, work)
        report = {"format_version": FORMAT_VERSION, "architecture": source.config["model_type"], "source": _source(source),
                  "precision": precision, "group_size": group_size, "quantiser": formats.quantiser,
                  "model": describe_model(decoder, source, ctx_size), "target": target, "defaults": defaults}
        prepared, probe = prepare(source, decoder, formats, calibration, mixed, work, report, preparing)
        graph = build(decoder, prepared, formats, ctx_size)
        graph.write(work, functions(graph.nodes), progress)
        onnx.checker.check_model(work / "model.onnx")
        report |= {"weights": formats.used, "requantised": formats.requantised, "rounded": formats.rounded,
                   "files": {path.name: sha256(path) for path in sorted(work.iterdir())}, "verify": {}}
        _write_report(work, report)
        report["verify"] = check(work, source, decoder)
        if probe is not None:
            report["mixed"]["measured_kl"] = divergence(work, source, decoder, probe)
        _write_report(work, report)
        _replace(work, folder)
    finally:  # also on Ctrl-C
        shutil.rmtree(work, ignore_errors=True)
    return report


def settle_quantiser(name: str, precision: str, calibration, mixed: str) -> str:
    """What "auto" means. Statistics win at every width, but cost a forward pass of text, too long a wait for what 4 bits gain."""
    bits = bits_of(precision)
    if bits is None and (calibration or (name, mixed) != ("auto", "auto")):
        raise ValueError(f"{precision} rounds nothing: it takes no quantiser, no calibration text and no choice of widths; leave them out")
    if mixed != "auto":
        load_mixed(mixed)
    if name == "auto":
        return "gptq" if bits and (bits < 4 or calibration) else "rtn"
    return name


def _precision(source, wanted):
    """The precision to export to; ValueError when the checkpoint's own does not allow the wanted one."""
    own = getattr(source.quantised_by, "PRECISION", None)
    if own and wanted not in (None, own, "fp16", "fp32"):
        raise ValueError(f"{source.folder}: its weights are {own} and stay so; leave the precision out, or give fp16 or fp32 for the "
                         "embedding and the head")
    return wanted or own or "int4"


def _source(source):
    return {"folder": _shown(source.folder.resolve().name), "name": _shown(source.config.get("_name_or_path")),
            "config_sha256": source.config_sha256}


def describe_model(decoder, source, ctx_size: int) -> dict:
    """`model` of edgeattn.json: the shape of a decoder, and the tokens that begin and end a text."""
    generation = source.read_json("generation_config.json")
    bos, eos = (generation.get(key, source.config.get(key)) for key in ("bos_token_id", "eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return {"vocab_size": decoder.vocab_size, "hidden_size": decoder.hidden_size, "num_layers": decoder.num_layers,
            "num_heads": decoder.num_heads, "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim, "window": decoder.window,
            "ctx_size": ctx_size, "max_position": decoder.max_position, "bos_token_id": bos, "eos_token_ids": eos}


def _shown(name) -> str:
    """A name somebody else gave, as edgeattn.json may hold it: it is shown in terminals."""
    return "".join(c for c in name if c.isprintable())[:MOST_TEXT] if isinstance(name, str) else ""


def _write_report(folder, report):
    (folder / "edgeattn.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _check_replaceable(folder):
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise ValueError(f"{folder}: is the current folder or holds it, and would be replaced whole; give a folder inside it")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "edgeattn.json").is_file())):
        raise ValueError(f"{folder}: exists and is not an earlier export; choose another folder or remove it")


def remove_abandoned(parent: Path, start: str) -> None:
    """Delete what exports to folders of `parent` whose names begin with `start` left behind when they were killed."""
    for path in parent.glob(f".{glob.escape(start)}*"):
        name, *rest = path.name[1:].rsplit(".", 2)
        if len(rest) < 2 or rest[1] not in ("tmp", "old") or not rest[0].isdigit() or psutil.pid_exists(int(rest[0])):
            continue
        if rest[1] == "old" and not (parent / name).exists():  # killed just between the two renames
            path.rename(parent / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _replace(work, folder):
    """Rename `work` to `folder`, which may hold an earlier export: it comes back when that fails."""
    old = work.with_suffix(".old")
    try:
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
