"""Memory of a chat with other settings of the cache, told before the model is loaded with them."""
from dataclasses import dataclass, replace

from edgeattn.apps import options
from edgeattn.apps.terminal import sparse_state
from edgeattn.cache.budget import choose_types
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions, evictions
from edgeattn.memory_estimate import Estimate, estimate, layer_bytes
from edgeattn.policies import policy_names
from edgeattn.scheduler import Scheduler, SparseOptions, refusal


@dataclass(frozen=True)
class Asked:
    """What a server was started with, before types were chosen to fit a budget and lengths cut to it; None: what the model is otherwise
    loaded with."""
    cache: CacheOptions = CacheOptions()
    sparse: SparseOptions = SparseOptions()
    ctx_size: int | None = None
    ubatch: int | None = None


def present(model, runtime: int) -> dict:
    """The settings of a model, what else could be chosen, and its memory. runtime: as `estimated` takes it."""
    chosen = model.cache.options
    same = chosen.k_type == chosen.v_type
    method = model.scheduler.options.method if model.scheduler else "auto" if model.dense_because else "off"
    return {"cache": {"cache_type": chosen.k_type if same else chosen.name, "kv_budget": chosen.budget or 0,
                      "kv_eviction": chosen.eviction, "sparse_attention": method},
            "choices": {"cache_type": options.KV_TYPES, "kv_eviction": ["auto", "none", *evictions()],
                        "sparse_attention": ["off", *policy_names("decode")]},
            "sparse_state": sparse_state(model, 0) if not model.dense_because else f"sparse attention off: {model.dense_because}",
            "memory": _told(estimated(model, runtime), model.ctx_size)}


def estimated(model, runtime: int) -> Estimate:
    """`estimate` of a model that has computed already. runtime: bytes that the process had before that; what it has now would count
    weights and cache that are in use a second time."""
    return replace(estimate(model), runtime=runtime)


def predict(model, asked: Asked, flags, runtime: int) -> dict:
    """{"total", "kv", "available", "ctx_size"} in bytes and tokens, as the model would take them when its context is full.

    model  loaded, with any settings
    flags  () -> all changes since, as Engine.reload takes them; ValueError, as everything that does not go together
    runtime  as `estimated` takes it
    """
    changes, now, about = flags(), estimated(model, runtime), model.config["model"]
    kind = {"k_type": changes["cache_type_k"], "v_type": changes["cache_type_v"]} if "cache_type_k" in changes else {}
    cache = asked.cache
    wanted = replace(cache, **kind, budget=changes.get("kv_budget", cache.budget), eviction=changes.get("kv_eviction", cache.eviction))
    sparse = SparseOptions(changes["sparse_attention"]) if "sparse_attention" in changes else asked.sparse
    shape = about["num_layers"], about["kv_heads"], about["head_dim"], min(asked.ctx_size or about["ctx_size"], about["ctx_size"])
    selection = _selection(model, sparse, wanted, about["window"], shape)
    ubatch = min(asked.ubatch or model.backend.tuned(model.config, bool(wanted.budget)).get("ubatch") or model.config["defaults"]["ubatch"],
                 shape[3])
    wanted = choose_types(wanted, model.config["defaults"]["kv_type"], *shape, ubatch, model.cache.plan.classes, selection)
    cache = KVCache(*shape, wanted, ubatch, model.cache.plan.classes, selection, model.backend)
    kv = int(layer_bytes(cache, cache.capacity, cache.plan.chunk).sum()) + cache.plan.state_bytes()
    workspace = now.workspace * cache.plan.chunk // model.ubatch  # nearly all of it is rows of a call's tokens
    total = replace(now, kv_layers=[kv], kv_state=0, workspace=workspace).total
    return {"total": total, "kv": kv, "available": now.available, "ctx_size": cache.capacity}


def _selection(model, sparse, cache: CacheOptions, window, shape):
    if sparse.method == "off":
        return None
    made = Scheduler(sparse, *shape[:2])
    made.load(model.folder, model.config)
    if why := refusal(made.policy, cache, window):
        if sparse.method != "auto":
            raise ValueError(f"--sparse-attention {sparse.method}: {why}")
        return None
    if sparse.method == "auto" and made.policy.tokens(shape[3]) >= shape[3]:
        return None
    return made.selection_plan(shape[3])


def _told(found, ctx_size):
    return {"total": found.total, "kv": sum(found.kv_layers) + found.kv_state, "available": found.available, "ctx_size": ctx_size}
