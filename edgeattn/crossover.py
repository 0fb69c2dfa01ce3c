"""From how many tokens on sparse decode pays on this machine: timed once for a model's shape, its cache and a policy, and remembered."""
import hashlib

from edgeattn.attention_case import AttentionCase
from edgeattn.cache.options import CacheOptions
from edgeattn.device_profile import part, remember
from edgeattn.kernels_cpu import LEVEL, PROFILE
from edgeattn.scheduler import NEVER, Scheduler

DEPTHS = 2048, 6144    # tokens between which times are taken for a straight line
ROUNDS = 15            # of which the fastest counts: others disturb, nothing hurries
GROWS = 1.5            # times that dense attention must take longer at the greater depth, or the machine was too busy to tell
UNMEASURED = 1.25      # times the policy's budget, where it was
GAIN = 0.95            # of the dense time, that a sparse step's may take where it begins
STEP = 256


def settle(scheduler: Scheduler, options: CacheOptions, heads: int, head_dim: int, threads: int) -> None:
    """Set the scheduler's `min_len` and `times`. options: with its types settled."""
    kv_heads, policy = scheduler.shape[1], scheduler.policy
    about = threads, heads, kv_heads, head_dim, options.k_type, options.v_type, options.storage, policy
    times = remembered(about, lambda: measure(scheduler, options, heads, head_dim, threads))
    if times is None:
        scheduler.min_len = int(UNMEASURED * policy.tokens(0))
    else:
        scheduler.times, scheduler.min_len = times, begin(times, policy)


def remembered(about: tuple, measure) -> dict | None:
    """What was measured before on this machine `about` these things, or is now; None where the machine was too busy to tell."""
    key = hashlib.sha256(repr((LEVEL, *about)).encode()).hexdigest()[:16]
    if isinstance(times := part(PROFILE, "crossovers").get(key), dict):
        return times
    times = measure()
    if times["dense"][1] < GROWS * times["dense"][0]:
        return None
    remember(PROFILE, "crossovers", key, times)
    return times


def measure(scheduler, options, heads, head_dim, threads) -> dict[str, list[float]]:
    """Seconds of one layer's attention at DEPTHS, of its selection, and of attention over what was selected."""
    found = {"depths": list(DEPTHS), "dense": [], "select": [], "attend": []}
    for depth in DEPTHS:
        one = Scheduler(scheduler.options, 1, scheduler.shape[1])
        one.components = scheduler.components  # the first layer's serve
        one.sources, one.groups = [0], [0]  # a layer that selects, whatever the policy's first layer does
        shape, about = (1, heads, scheduler.shape[1], head_dim), CacheOptions(options.k_type, options.v_type, options.storage)
        dense, sparse = (AttentionCase(about, shape, depth, threads, x) for x in (None, one))
        times = [(dense.step()[1], *sparse.step()) for _ in range(ROUNDS + 1)][1:]
        for name, values in zip(("dense", "select", "attend"), zip(*times)):
            found[name].append(min(values))
    return found


def begin(times: dict, policy) -> int:
    """The first length at which selecting and reading what was selected takes less than GAIN of the dense time."""
    for tokens in range(STEP, 1 << 17, STEP):
        dense = line(times, "dense", tokens)
        read = line(times, "dense", policy.tokens(tokens)) if policy.tokens(tokens) < tokens else dense
        if read + max(line(times, "select", tokens), 0) <= GAIN * dense:
            return tokens
    return NEVER


def line(times: dict, name: str, tokens: int) -> float:
    """Seconds at a length, on the straight line through what was measured."""
    (low, high), (first, second) = times["depths"], times[name]
    return first + (second - first) * (tokens - low) / (high - low)
