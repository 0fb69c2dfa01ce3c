"""The work of `edgeattn eval`: what is missing of a call's records, measured setting by setting and kept as soon as it is there."""
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from edgeattn.apps import axes, models, options
from edgeattn.apps.progress import Progress
from edgeattn.apps.record import append, common, model_name, read, tell_versions, version
from edgeattn.evaluation import Source, load_task, run
from edgeattn.evaluation.asking import SLACK, widen
from edgeattn.evaluation.kld import made_by
from edgeattn.evaluation.outcome import Outcome
from edgeattn.evaluation.words import HAYSTACK
from edgeattn.runtime import read_config

UBATCH = 128  # tokens of a chunk: it sees its own before they are stored, and the evaluation is of what is stored


class Evaluation:
    """args: of `edgeattn eval`; settings: axes.expand(args)."""

    def __init__(self, args, settings: list):
        self._args, self._settings = args, [one for _, one in settings]
        given = {"perplexity": {"decode": args.decode}, "docqa": {"documents": args.documents},
                 "kld": {"decode": args.decode, "base": args.base, "save": args.save_base}}
        self._options = {name: given.get(name, {}) for name in args.tasks}
        self._known = stored(args.out)
        self._bases: dict[int, str] = {}  # length -> file of the first setting's probabilities

    def records(self) -> Iterator[dict]:
        """Every record of the call, settings one after the other. ValueError: a task's source does not do."""
        first, plans = {}, [self._plan(number, one) for number, one in enumerate(self._settings)]
        self._check_base(plans[0])
        with tempfile.TemporaryDirectory(prefix="edgeattn-eval-") as self._work:
            for number, plan in enumerate(plans):
                for record in self._of_setting(number, plan, plans):
                    base = first.setdefault((record["task"], record["depth"]), record)
                    if record["against"] is None and base is not record:
                        record["against"] = compare(record, base)
                    if record.pop("new", False):
                        self._keep(record)
                    yield record

    def _plan(self, number, one) -> list[tuple[str, Source, str]]:
        """(task, source, key) of everything that is wanted of a setting."""
        folder = models.exported(one.model, one.precision)
        reach = read_config(folder)["model"]["ctx_size"]
        reach, found = min(one.ctx_size or reach, reach), []
        for name, options_ in self._options.items():
            task = load_task(name, **options_)
            lengths = self._args.lengths or [min(task.length, reach - task.room)]
            if name == "kld" and self._args.save_base and len(lengths) > 1:
                raise ValueError("--save-base keeps windows of one length: give one of --lengths")
            for length in lengths:
                if length + task.room > reach:
                    raise ValueError(f"{name}: {length} tokens and {task.room} for questions and answers need a context of "
                                     f"{length + task.room}, there are {reach}; lower --lengths{', or raise -c' if one.ctx_size else ''}")
                source = Source(self._args.text, length, self._args.samples or task.samples, self._args.seed)
                task.total(source)  # a mistake should not wait for a model
                found.append((name, source, self._key(name, source, folder, one, number)))
        return found

    def _check_base(self, plan):
        """ValueError: --base is none, or --save-base names a file that holds something else."""
        if self._args.base and made_by(self._args.base) is None:
            raise ValueError(f"{self._args.base}: no base file; make one with edgeattn eval kld --save-base FILE")
        path = self._args.save_base
        if not path or not Path(path).is_file():
            return
        about, key = made_by(path), next(key for name, _, key in plan if name == "kld")
        if about is None:
            raise ValueError(f"{path}: is there, and no base file; give --save-base another name")
        if about.get("key") != key:
            made = ", ".join(str(about[name]) for name in ("model", "setting", "edgeattn") if about.get(name))
            raise ValueError(f"{path}: holds another base ({made or 'of an older version'}), not this call's; remove it, or give "
                             "--save-base another name")

    def _key(self, name, source, folder, one, number):
        """Of all that a record's figures depend on."""
        sparse, prefill = options.sparse_options(one), options.prefill_options(one)
        calibration = folder / "calibration.safetensors"
        about = [version(), name, asdict(replace(source, text=None)), digest(source.text or HAYSTACK), digest(folder / "edgeattn.json"),
                 digest(calibration if calibration.is_file() else None), repr(options.cache_options(one)), repr(sparse), repr(prefill),
                 one.ubatch_size or UBATCH, one.device, one.ctx_size if one.kv_budget else 0,
                 *([one.threads] if one.threads else [])]
        if name in ("perplexity", "kld"):
            about.append(self._args.decode)
        if name == "docqa":
            about.append(digest(self._args.documents))
        if name == "kld" and self._args.base:
            about.append([digest(self._args.base), made_by(self._args.base)])
        elif name == "kld" and number:
            first = self._settings[0]
            about.append(self._key(name, source, models.exported(first.model, first.precision), first, 0))
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def _of_setting(self, number, plan, plans):
        missing = [entry for entry in plan if self._missing(number, entry, plans)]
        if not missing:
            yield from (self._known[key] for _, _, key in plan)
            return
        one = self._settings[number]
        model, tokenizer = self._load(one, max(source.length + load_task(name).room for name, source, _ in missing))
        for name, source, key in plan:
            if (name, source, key) not in missing:
                yield self._known[key]
                continue
            task_options = self._options[name] | (self._base_options(number, source, key) if name == "kld" else {})
            label = f"{axes.setting(one) or 'as it is'}: {name}, {source.length:,} tokens"
            with counted(label, load_task(name, **task_options).total(source)) as advance:
                found = run(model, tokenizer, name, source, advance, **task_options)
            record = common("eval", one, model) | found | {"against": None, "key": key, "new": key not in self._known}
            yield record if record["new"] else self._known[key]

    def _missing(self, number, entry, plans):
        """Whether it is not in the file, or what others that are not will be compared with is no longer there."""
        name, source, key = entry
        if key not in self._known:
            return True
        if name != "kld" or number or self._args.base:
            return False
        if self._args.save_base:
            return not Path(self._args.save_base).is_file()
        return any(other[2] not in self._known for plan in plans[1:] for other in plan if other[:2] == (name, source))

    def _base_options(self, number, source, key):
        if self._args.base:
            return {}
        if not number:
            self._bases[source.length] = self._args.save_base or str(Path(self._work) / f"{source.length}.npy")
            if len(self._settings) == 1 and not self._args.save_base:
                return {}
            one = self._settings[0]
            about = {"key": key, "model": model_name(read_config(models.exported(one.model, one.precision))), "setting": axes.setting(one),
                     "edgeattn": version()}
            return {"save": self._bases[source.length], "about": about}
        return {"base": self._bases.get(source.length) or self._args.save_base, "save": None}

    def _load(self, one, tokens):
        one.ubatch_size = one.ubatch_size or UBATCH
        # With a budget types are chosen so that the whole context fits: a smaller one would be another setting.
        reach = read_config(models.exported(one.model, one.precision))["model"]["ctx_size"]
        model, tokenizer = models.load(one, ctx_size=None if one.kv_budget else min(tokens + SLACK, reach))
        widen(model)
        return model, tokenizer

    def _keep(self, record):
        if self._args.out:
            append(self._args.out, record)


def compare(record: dict, base: dict) -> dict | None:
    """What a record says of its difference from another setting's; None where the two did not get the same questions, as with models whose
    tokenizers make another number of windows of a text."""
    if [len(row) for row in record["values"]["of"]] != [len(row) for row in base["values"]["of"]]:
        return None
    difference, low, high = Outcome.of(record).against(Outcome.of(base))
    return {"setting": base["setting"], "model": base["model"], "difference": difference, "low": low, "high": high}


def stored(path: str | None) -> dict[str, dict]:
    """Records of a file by key; none where there is no file. ValueError names a line that is none."""
    if not path or not Path(path).is_file():
        return {}
    records = [record for record in read(path) if record["kind"] == "eval" and "key" in record]
    tell_versions(records, path, "what they say is measured again")
    return {record["key"]: record | {"against": None} for record in records}


def digest(path) -> str | None:
    """Of a file's content: its size and its first MiB. None for none."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.sha256(f"{Path(path).stat().st_size} ".encode() + file.read(1 << 20)).hexdigest()


@contextmanager
def counted(label: str, total: int):
    """Gives advance(n), which shows how far one thing is."""
    done = 0
    with Progress(label, patience=0) as progress:
        def advance(n):
            nonlocal done
            done += n
            progress("", done, total)
        advance(0)
        yield advance
