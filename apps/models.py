"""From -m to a loaded model: exported folders, checkpoints (exported once, into the user's cache), the bundled one."""
import argparse
import glob
import hashlib
import os
import shutil
import sys
from pathlib import Path

from edgeattn.apps.options import cache_options, prefill_options, sparse_options
from edgeattn.apps.progress import Progress

BUNDLED = ("nano", "nano-ternary")  # the first is the default


def cache_folder() -> Path:
    """Where exported checkpoints are kept."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "edgeattn/models"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "edgeattn/models"


def find(name: str | None) -> Path:
    """What -m means: a folder, exported or a checkpoint, or a GGUF file; ValueError says what else to give."""
    if not name:  # whatever the current folder holds
        return _bundled(BUNDLED[0])
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "edgeattn.json").is_file() or (path / "config.json").is_file():
            return path
        raise ValueError(f"{path}: neither an exported folder (edgeattn.json) nor a Hugging Face checkpoint (config.json)")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return path
        raise ValueError(f"{path}: is a file, but not GGUF; give the folder of a Hugging Face checkpoint or of an export, or a GGUF file")
    if str(path) in BUNDLED:
        return _bundled(str(path))
    hint = f"; to download it: hf download {name} --local-dir {path.name}" if str(name).count("/") == 1 and name[0] not in "./~" else ""
    raise ValueError(f"{path}: no such folder{hint}")


def _bundled(name):
    import edgeattn
    path = Path(edgeattn.__file__).parent.parent / "models" / name
    if not path.is_dir():
        raise ValueError("the bundled models come with the source tree only, and this is an installed package; "
                         "give a model: -m FOLDER (an export or a Hugging Face checkpoint)")
    return path


def exported(name: str | None, precision: str | None = None) -> Path:
    """The exported folder for -m; a checkpoint is exported into the cache first, unless that was done before."""
    path = find(name)
    if (path / "edgeattn.json").is_file():
        return path
    where, content = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in (str(path.resolve()), _fingerprint(path)))
    stem = f"{path.resolve().name}-{precision or 'default'}-{where}-"
    folder = cache_folder() / (stem + content)
    if not (folder / "edgeattn.json").is_file():
        _export(path, folder, precision, stem)
    for old in cache_folder().glob(glob.escape(stem) + "*"):
        if old != folder:  # made from older files, or by another version
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _fingerprint(checkpoint):
    """Changes whenever the checkpoint's files, the exporters or the layout of weights do."""
    from edgeattn import exporters, ops
    from edgeattn.reference import matmul_nbits, matmul_ternary
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent  # a GGUF file's tokenizer may lie beside it
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".model") or p == checkpoint)
    about = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    sources = [*sorted(Path(exporters.__file__).parent.rglob("*.py")), *(Path(m.__file__) for m in (matmul_nbits, matmul_ternary, ops))]
    return "\n".join(about + [hashlib.sha256(p.read_bytes()).hexdigest() for p in sources])


def _export(checkpoint, folder, precision, stem):
    from edgeattn.exporters.export import export, remove_abandoned
    remove_abandoned(folder.parent, stem)  # also what a killed export of other files left
    to = f" to {precision}" if precision else ""
    with Progress(f"exporting {checkpoint.name}{to} (once)", patience=0) as progress:
        report = export(checkpoint, folder, precision=precision, progress=progress.exporting, preparing=progress.preparing)
    warn_requantised(report)


def warn_requantised(report: dict, asked: bool = False) -> None:
    """One line on stderr when an export quantised again what was quantised before, `asked` to or not."""
    if report["requantised"]:
        kinds = ", ".join(sorted(set(report["requantised"].values())))
        why = "" if asked else ", because no format here holds their codes"
        print(f"quantised again, with loss{why}: {len(report['requantised'])} tensors ({kinds})", file=sys.stderr)


def load(args: argparse.Namespace, ctx_size: int | None = None, chat: bool = False):
    """(model, tokenizer) for the flags of options.add_model; `chat` refuses a model without a working chat template."""
    # a mistake there should not wait for an export
    cache, sparse, prefill = cache_options(args), sparse_options(args), prefill_options(args)
    if args.device == "cuda":
        from edgeattn.cuda_limits import asked_refusal
        from edgeattn.devices import cuda_missing
        if why := asked_refusal(sparse, prefill) or cuda_missing():
            raise ValueError(why)
    folder = exported(args.model, args.precision)
    from edgeattn.runtime import Model
    from edgeattn.tokenizer import Tokenizer
    tokenizer, wanted = Tokenizer(folder), ctx_size or args.ctx_size or None
    if chat:
        tokenizer.encode_chat([{"role": "user", "content": "?"}])
    with Progress(f"compiling kernels for {'this CPU' if args.device == 'cpu' else 'this machine'} (once)") as progress:
        model = Model.load(folder, cache=cache, ctx_size=wanted, ubatch=args.ubatch_size, threads=args.threads, sparse=sparse,
                           prefill=prefill, progress=progress, device=args.device)
    if wanted and wanted > model.ctx_size:
        why = "the KV budget holds" if model.ctx_size < model.config["model"]["ctx_size"] else "this export allows"
        print(f"context limited to {model.ctx_size} tokens, all that {why}", file=sys.stderr)
    return model, tokenizer


def explain(args: argparse.Namespace, model) -> None:
    """With --explain: what sparse attention did, on stderr."""
    if args.explain:
        lines = model.scheduler.explain() if model.scheduler else [
            "sparse attention is off" + ("" if args.sparse_attention == "off" else f": {model.dense_because}")]
        lines = [*lines, *(model.prefill.explain() if model.prefill else [
            "sparse prefill is off" + ("" if args.sparse_prefill == "off" else f": {model.whole_because}")])]
        print("\n".join(lines), file=sys.stderr)
