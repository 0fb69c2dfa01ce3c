"""Decode steps with fewer kernels: a product of one token takes in the normalisation before it and the sum or gate behind it
(gemv_around.cuh), a normalisation the other order of its columns that a product wants (rms_normalization.cu), attention the choice of its
pages (chosen_attention.py). All values are written as if every step had run by itself."""
from dataclasses import replace

import numpy as np

from edgeattn.kernels_cuda import chosen_attention

AROUND = np.dtype([(name, "i8") for name in ("gain", "normal", "other", "sum", "gated")]
                  + [(name, "i4") for name in ("epsilon", "activation", "half", "spare")])  # the kernel's struct of that name
BEFORE, AFTER = "before", "after"  # in a step's arguments: those of the steps that it takes in
ROW = 4096       # the longest that a product normalises: what registers of the smallest block hold


def fuse(steps: list, most: dict) -> list:
    """Steps (backend_cuda.Step) of a bucket, `most` -> as many or fewer."""
    found = []
    for step in steps:
        if getattr(step.kernel, "FOR_PROMPTS", False) and not most.get("listed"):  # launches nothing, and stands between neighbours
            continue
        last = found[-1] if found else None
        if last and step.operator == "matmul_nbits" and _normalises(last, step.arguments, most):
            found[-1] = replace(step, arguments=step.arguments | {BEFORE: last.arguments})
        elif last and last.operator == "matmul_nbits" and AFTER not in last.arguments and _follows(step, last.arguments, most):
            found[-1] = replace(last, arguments=last.arguments | {AFTER: step.arguments})
        elif last and step.operator == "gather_columns" and _orders(last, step.arguments, most):
            found[-1] = replace(last, arguments=last.arguments | {AFTER: step.arguments})
        elif last and _chooses(last, step, most):
            found[-1] = replace(step, kernel=chosen_attention, arguments=step.arguments | {chosen_attention.CHOICE: last.arguments})
        else:
            found.append(step)
    return found


def _one(a, most) -> bool:
    """Whether gemv_nbits.cu's kernel of one token runs a product."""
    return most[a["x.rows"]] == 1 and a["block_size"] >= 32


def _normalises(last, a, most) -> bool:
    """Whether the step `last` makes a product's row by normalising one that the product writes nowhere near."""
    n = last.arguments
    return (last.operator == "rms_normalization" and AFTER not in n and _one(a, most) and n["x.rows"] == a["x.rows"] and n["out"] == a["x"]
            and n["x.groups"] == 1 and n["x.width"] == a["K"] and a["K"] <= ROW and a["K"] % 8 == 0
            and not (n["x"] | n["out"] | n["weight"]) % 16 and _apart(n["x"], a["K"], a["out"], a["N"]))


def _follows(step, a, most) -> bool:
    """Whether a step takes a product's row and writes nowhere near what the product reads."""
    b = step.arguments
    if step.operator not in ("add", "gated_activation") or not _one(a, most) or b["x.rows"] != a["x.rows"]:
        return False
    read, width = row_of(a), b["x.width"] // (1 if step.operator == "add" else 2)
    if step.operator == "add" and (a["out"] not in (b["x"], b["y"]) or b["x"] == b["y"]):
        return False
    if step.operator == "gated_activation" and (b["x"] != a["out"] or a["N"] % 32):
        return False
    return b["x.width"] == a["N"] and _apart(read, a["K"], b["out"], width) and _apart(a["out"], a["N"], b["out"], width)


def _orders(last, b, most) -> bool:
    """Whether a step puts the columns of the row that `last` normalises in another order, nowhere near what that reads or writes."""
    n = last.arguments
    return (last.operator == "rms_normalization" and AFTER not in n and n["x.groups"] == 1 and most[n["x.rows"]] == 1
            and b["x.rows"] == n["x.rows"] and b["x"] == n["out"] and b["order.0"] == n["x.width"]
            and all(_apart(n[read], n["x.width"], b["out"], b["order.0"]) for read in ("x", "out")))


def _chooses(last, step, most) -> bool:
    """Whether attention takes in the choice of its pages."""
    both = last.operator == "select_pages" and step.operator == "cached_attention"
    return both and chosen_attention.takes(last.arguments, step.arguments, most)


def _apart(x: int, n: int, y: int, m: int) -> bool:
    """Whether n floats at address x and m at y share none."""
    return x + 4 * n <= y or y + 4 * m <= x


def around(a: dict) -> np.ndarray:
    """The kernel's struct Around for a product's arguments."""
    made = np.zeros((), AROUND)
    if before := a.get(BEFORE):
        made["gain"], made["normal"] = before["weight"], before["out"]
        made["epsilon"] = np.uint32(before["epsilon"] & 0xffffffff).view(np.int32)
    after = a.get(AFTER, {})
    if "y" in after:
        made["other"], made["sum"] = after["y"] if after["x"] == a["out"] else after["x"], after["out"]
    elif after:
        made["gated"], made["activation"], made["half"] = after["out"], after["activation"], a["N"] // 32
    return made


def row_of(a: dict) -> int:
    """Address of the row that a product reads."""
    return a[BEFORE]["x"] if BEFORE in a else a["x"]
