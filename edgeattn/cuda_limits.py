"""What does not run on a GPU yet, in one line each, before anything is loaded. The CPU has all of it."""
from edgeattn.cache.options import RELEASING, CacheOptions, evictions
from edgeattn.kernels_cuda.attention_call import HEADS
from edgeattn.kernels_cuda.cached_attention import MOST_DEPTH
from edgeattn.kernels_cuda.select_pages import SCORES
from edgeattn.policies import load_policy, policy_names


def cache_refusal(options: CacheOptions) -> str:
    """Why a cache with these options cannot be kept there; "" where it can."""
    asked = [flag for flag, found in (
        (f"--kv-storage {options.storage}", options.storage != "kivi"),
        ("--kv-progressive", options.progressive > 0)) if found]
    return f"{' and '.join(asked)} cannot run on the GPU yet: leave out, or use --device cpu" if asked else ""


def decode_refusal(policy, heads: int = 1, kv_heads: int = 1) -> str:
    """Why a decode policy's page selection cannot run there."""
    layer = next((i for i, source in enumerate(policy.sources(8)) if source == i), 7)
    scores = {about.get("score") for name, about in policy.operators(layer)}
    if policy.thresholds or policy.means or not scores <= set(SCORES):
        return "the GPU's kernels do not score pages in this way yet"
    return f"the GPU's kernels take {HEADS} query heads a KV head at most" if heads > HEADS * kv_heads else ""


def prefill_refusal(policy, correction: str | None = None, heads: int = 1, kv_heads: int = 1) -> str:
    """Why what a prefill policy chooses cannot be found there."""
    if not policy.operators():
        return "the GPU has no kernels that choose in this way yet"
    if (correction or policy.correction) == "tail":
        return "of --prefill-correction the GPU has none and delta yet"
    return f"the GPU's kernels take {HEADS} query heads a KV head at most" if heads > HEADS * kv_heads else ""


def check(options: CacheOptions, sparse, prefill, about: dict) -> tuple[str, str]:
    """What the user chose (SparseOptions, PrefillOptions) -> why sparse decode steps and sparse prompts give way, if they were not asked
    for by name. ValueError: a model or a cache that cannot be on the GPU."""
    for why in (model_refusal(about), cache_refusal(options)):
        if why:
            raise ValueError(why)
    policy = sparse.policy()
    dense = decode_refusal(policy, about["num_heads"], about["kv_heads"]) if policy else ""
    policy = prefill.policy()
    whole = prefill_refusal(policy, prefill.correction, about["num_heads"], about["kv_heads"]) if policy else ""
    return dense, whole


def model_refusal(about: dict) -> str:
    """Why a model of these sizes (edgeattn.json's "model") cannot run there."""
    if about["head_dim"] > MOST_DEPTH:
        return f"this model's heads have {about['head_dim']} channels, the GPU's kernels take {MOST_DEPTH} at most: use --device cpu"
    return ""


def matrix_lines() -> list[str]:
    """What runs on the GPU, for people."""
    works, reads = ([name for name in policy_names(kind) if not refusal(load_policy(kind, name))]
                    for kind, refusal in (("decode", decode_refusal), ("prefill", prefill_refusal)))
    return [f"--device cuda: --kv-storage kivi --kv-heads none {' '.join(policy_names('heads'))} --kv-eviction none "
            f"{' '.join(evictions())} {RELEASING}, any -ctk and -ctv",
            f"--device cuda: --sparse-attention off {' '.join(works)}; --sparse-prefill off {' '.join(reads)}, each with "
            "--prefill-correction delta",
            "all other methods are refused there before a model is loaded"]
