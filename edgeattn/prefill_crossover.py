"""From how many tokens on sparse prefill pays on this machine: timed once for a model's shape, its cache and a policy, and remembered."""
from edgeattn.attention_case import AttentionCase
from edgeattn.cache.options import CacheOptions
from edgeattn.crossover import GAIN, STEP, line, remembered
from edgeattn.prefill_scheduler import PrefillScheduler
from edgeattn.scheduler import NEVER

DEPTHS = 2048, 6144  # tokens before a chunk, between which times are taken for a straight line
CHUNK = 512
ROUNDS = 3           # of which the fastest counts: others disturb, nothing hurries


def settle(scheduler: PrefillScheduler, options: CacheOptions, heads: int, kv_heads: int, head_dim: int, threads: int) -> None:
    """Set the scheduler's `min_len`, where its policy says how much it reads and the machine is not too busy to tell. options: with its
    types settled."""
    policy = scheduler.policy
    if policy.tokens(0) is None:
        return
    about = "prefill", threads, heads, kv_heads, head_dim, options.k_type, options.v_type, options.storage, policy, scheduler.correction
    times = remembered(about, lambda: measure(scheduler, options, heads, kv_heads, head_dim, threads))
    if times is not None:
        scheduler.times, scheduler.min_len = times, begin(times, policy)


def measure(scheduler, options, heads, kv_heads, head_dim, threads) -> dict[str, list[float]]:
    """Seconds of one layer's attention of a chunk behind DEPTHS tokens, of choosing, and of attention over what was chosen."""
    found = {"depths": [depth + CHUNK for depth in DEPTHS], "dense": [], "choose": [], "attend": []}
    for depth in DEPTHS:
        about = CacheOptions(options.k_type, options.v_type, options.storage)
        case = AttentionCase(about, (1, heads, kv_heads, head_dim), depth, threads, tokens=CHUNK)
        one = PrefillScheduler(scheduler.options, 1)
        one.assets = scheduler.assets
        times = [(case.step()[1], *case.step(prefill=one)) for _ in range(ROUNDS + 1)][1:]
        for name, values in zip(("dense", "choose", "attend"), zip(*times)):
            found[name].append(min(values))
    return found


def begin(times: dict, policy) -> int:
    """The first length at which choosing and reading what was chosen takes less than GAIN of the dense time. Reading takes a dense chunk's
    time of so many tokens, by the factor that was measured at the greater depth: corrections and lists cost something too."""
    longest = times["depths"][1]
    factor = times["attend"][1] / line(times, "dense", policy.tokens(longest))
    for tokens in range(STEP, 1 << 17, STEP):
        read = policy.tokens(tokens)
        sparse = factor * line(times, "dense", read) + max(line(times, "choose", tokens), 0)
        if read < tokens and sparse <= GAIN * line(times, "dense", tokens):
            return tokens
    return NEVER
