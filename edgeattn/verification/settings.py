"""A model with each cache type and policy against itself with a dense 16-bit cache, over the same text.

The limits tell what computes wrongly from what rounds or leaves out: they are parts of what answers one token late would diverge by, which
is measured on the same text. What a setting costs a model's answers is for `edgeattn eval` to say.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from edgeattn.cache.options import CacheOptions, evictions
from edgeattn.cache.pages import CacheFull
from edgeattn.calibration import passkeys
from edgeattn.log_softmax import log_softmax
from edgeattn.policies import load_policy, policy_names
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer
from edgeattn.verification import Check

PROMPT, DECODED = 768, 32  # tokens of the text: read in chunks, and one by one
CHUNK = 256                # of the prompt; the last one's logits count
BUDGET = 320               # tokens that a sparse step reads
KEPT = 0.6                 # of the dense cache's bytes, where tokens are evicted
SEED = 0
# KL, as a part of what answers one token late diverge by, and top-1 agreement: some five times what the bundled model shows, whose 16-bit
# cache differs from a 32-bit one by 0.00004, and in 3 of 100 answers that are next to ties
LIMITS = {"exact": (0.0003, 0.9), "int8": (0.0006, 0.9), "int4": (0.0015, 0.9), "int3": (0.003, 0.85), "int2": (0.02, 0.75),
          "stored": (0.008, 0.85), "auto": (0.03, 0.75), "evicts": (0.08, 0.65), "reads less": (0.25, 0.5)}
UNTRAINED = "says nothing: the model is untrained, and does no better than chance"


@dataclass(frozen=True)
class Setting:
    """flags: as a user gives them; kind: of LIMITS; decoded: whether only tokens that come one by one differ from the base's."""
    flags: str
    kind: str
    cache: dict = field(default_factory=dict)
    sparse: tuple = ("off",)
    prefill: tuple = ("off",)
    decoded: bool = False


def settings(every: bool) -> Iterator[Setting]:
    """Those that users meet by default or choose first, or all."""
    for kind in ("int8", "int4", "int3", "int2"):
        yield Setting(f"-ctk {kind} -ctv {kind}", kind, dict(k_type=kind, v_type=kind))
    part = {"budget": BUDGET, "fraction": 0.0}
    yield Setting("--sparse-attention auto", "auto", sparse=("auto", part), decoded=True)
    yield Setting("--sparse-prefill auto", "auto", prefill=("auto", part))
    yield Setting("-ctk int4 -ctv int4 --sparse-attention auto", "auto", dict(k_type="int4", v_type="int4"), ("auto", part), decoded=True)
    yield Setting("--kv-eviction key_diff", "evicts", dict(eviction="key_diff"))
    if every:
        yield from _methods()


def _methods():
    yield Setting("-ctk f32 -ctv f32", "exact", dict(k_type="f32", v_type="f32"))
    for k, v in (("int8", "int4"), ("int4", "f16"), ("f16", "int4")):
        yield Setting(f"-ctk {k} -ctv {v}", "int4", dict(k_type=k, v_type=v))
    for name in policy_names("storage"):
        own = load_policy("storage", name).keys
        yield Setting(f"--kv-storage {name} -ctv int4" if own else f"--kv-storage {name} --kv-bits 4", "stored",
                      dict(storage=name, k_type=own or "int4", v_type="int4"))
    for name in evictions():
        if name != "key_diff":
            yield Setting(f"--kv-eviction {name}", "evicts", dict(eviction=name))
    for name in policy_names("heads"):
        yield Setting(f"--kv-heads {name}", "evicts", dict(heads=name))
    for name in policy_names("decode"):
        if name != "auto":
            budget = {"budget": BUDGET} if hasattr(load_policy("decode", name), "budget") else {}
            yield Setting(f"--sparse-attention {name}", "reads less", sparse=(name, budget), decoded=True)
    for name in policy_names("prefill"):
        if name != "auto":
            yield Setting(f"--sparse-prefill {name}", "reads less", prefill=(name, {}))


def check_settings(folder, device: str, every: bool, progress: Callable | None = None) -> list[Check]:
    """A Check for each setting; one that the device or the model does not have is left out, and its note says why.
    progress(what, done, total). ValueError: the model cannot be loaded."""
    base = _load(folder, device, Setting("", ""), 0)
    if base.ctx_size < PROMPT + DECODED:
        return [Check("setting", "all", None, {}, f"need {PROMPT + DECODED} tokens of context, the model has {base.ctx_size}")]
    ids = text(base)
    expected = np.stack([log_softmax(row) for row in answers(base, ids)], dtype=np.float32)
    late = divergence(expected[1:], expected[:-1])[0]
    trained = -expected[np.arange(len(expected) - 1), ids[1 - len(expected):]].mean() < np.log(base.vocab_size)
    found, wanted = [], list(settings(every))
    for i, setting in enumerate(wanted):
        if progress:
            progress(setting.flags, i, len(wanted))
        check = _check(folder, device, setting, base, ids, expected, late)
        vague = not trained and check.passed is False and np.isfinite(check.figures.get("kl", np.inf))
        found.append(replace(check, passed=None, note=UNTRAINED) if vague else check)
    return found


def _check(folder, device, setting, base, ids, expected, late):
    try:
        model = _load(folder, device, setting, int(KEPT * base.cache.total_bytes))
    except ValueError as error:  # the way in which settings are refused
        return Check("setting", setting.flags, None, {}, " ".join(str(error).split()))
    own = slice(-DECODED, None) if setting.decoded else slice(None)
    try:
        kl, top1 = divergence(expected[own], answers(model, ids)[own])
    except (ValueError, RuntimeError, CacheFull) as error:
        return Check("setting", setting.flags, False, {}, " ".join(str(error).split()))
    limit, least = LIMITS[setting.kind][0] * late, LIMITS[setting.kind][1]
    return Check("setting", setting.flags, bool(kl <= limit and top1 >= least),
                 {"kl": kl, "kl_limit": limit, "top1": top1, "top1_limit": least})


def _load(folder, device, setting, budget):
    """The model with a setting, and room for the text."""
    cache = dict(k_type="f16", v_type="f16") | setting.cache
    if cache.get("eviction"):
        cache["budget"] = budget
    return Model.load(folder, device=device, cache=CacheOptions(**cache), ctx_size=PROMPT + DECODED, ubatch=CHUNK,
                      sparse=SparseOptions(*setting.sparse, min_len=0), prefill=PrefillOptions(*setting.prefill, min_len=0))


def text(model) -> np.ndarray:
    """[PROMPT + DECODED] token ids: sentences with facts in them, which are asked for at the end; or any ids, where
    there is no tokenizer for that."""
    try:
        ids, asked = passkeys(Tokenizer(model.folder), PROMPT, SEED)
        found = np.array([*ids, *(token for pair in asked for part in pair for token in part)])[:PROMPT + DECODED]
    except ValueError:
        found = np.zeros(0, np.int64)
    if len(found) == PROMPT + DECODED and found.max() < model.vocab_size:
        return found
    return np.random.default_rng(SEED).integers(0, model.vocab_size, PROMPT + DECODED)


def answers(model, ids: np.ndarray) -> np.ndarray:
    """Logits [CHUNK + DECODED, vocab] float32 after the last chunk's tokens of the prompt and each token that comes by itself."""
    sequence = model.new_sequence()
    try:
        model.forward([(sequence, ids[:PROMPT - CHUNK])], "none")
        rows = [model.forward([(sequence, ids[PROMPT - CHUNK:PROMPT])], "all")]
        return np.concatenate([*rows, *(model.forward([(sequence, ids[i:i + 1])]) for i in range(PROMPT, PROMPT + DECODED))])
    finally:
        model.free(sequence)


def divergence(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """(mean KL in nats from the first to the second, top-1 agreement) of log-probabilities and logits [n, vocab] float32; infinity where
    one is not finite."""
    kl = []
    for p, row in zip(expected, got, strict=True):  # a row at a time: they are long
        kl.append(float(np.exp(p) @ (p - log_softmax(row).astype(np.float32))))
    found = float(np.mean(kl))
    return found if np.isfinite(found) else np.inf, float((expected.argmax(-1) == got.argmax(-1)).mean())
