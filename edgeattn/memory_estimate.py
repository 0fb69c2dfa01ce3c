"""What a loaded model will take when its context is full. Loading maps weights and reserves memory, but touches neither: the operating
system gives pages of memory when they are first used, so the sum below is told before it is taken."""
from dataclasses import asdict, dataclass

import numpy as np
import psutil

from edgeattn.page_formats import PAGE


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    weights    of the mapped file; on a GPU, copied there
    kv_layers  pages of each layer's keys and values
    kv_state   page lists, positions, indexes and whatever else a sequence has
    workspace  values between operators, and their scratch memory; on a GPU lists of what prompts read
    runtime    Python, libraries, compiled code: measured
    token_bytes  of one token more in the cache
    available  free memory, and what the model has taken of it by now: of the GPU, if the model is there
    on_device  what of this lies on a GPU with memory of its own; 0 elsewhere
    """
    weights: int
    kv_layers: list[int]
    kv_state: int
    workspace: int
    runtime: int
    token_bytes: float
    available: int
    on_device: int

    @property
    def total(self) -> int:
        return self.weights + sum(self.kv_layers) + self.kv_state + self.workspace + self.runtime

    def as_dict(self) -> dict:
        return asdict(self) | {"kv": sum(self.kv_layers) + self.kv_state, "total": self.total}


def estimate(model) -> Estimate:
    """Of a Model that has computed nothing yet, for one sequence that fills the context, read in chunks of `ubatch` tokens."""
    cache, plan = model.cache, model.plan
    weights, runtime = plan.graph.mapped_bytes, psutil.Process().memory_info().rss
    layers = layer_bytes(cache, model.ctx_size, model.ubatch)
    workspace = plan.touched_bytes({"tokens": model.ubatch, "rows": 1, "sequences": 1, "probes": 0}) + model._batch.list_bytes
    own, available = 0, psutil.virtual_memory().available
    if model.device != "cpu":
        free, (taken, shared) = model.backend.free_bytes()[0], model.backend.device_bytes()  # the weights are there by now
        weights = model.backend.weight_bytes
        available = (available if shared else free) + taken
        own = 0 if shared else weights + int(layers.sum()) + cache.plan.state_bytes() + workspace
    return Estimate(weights, layers.tolist(), cache.plan.state_bytes(), workspace, runtime, cache.read_bytes(2048) / 2048, available, own)


def layer_bytes(cache, tokens: int, chunk: int) -> np.ndarray:
    """[layers] int64, bytes of a KVCache's pages with so many tokens of one sequence, at their most: while the last `chunk` is being read,
    it is floats still."""
    each = cache.head_bytes(np.minimum(cache.plan.limits, tokens))
    if len(cache.pools) > 1:
        each = each + -(-min(chunk, tokens) // PAGE) * cache.pools[0].format.page_bytes
    reserved = sum(n * f.page_bytes for n, f in zip(cache.plan.pages, cache.plan.formats))
    return (each.sum(1) * min(1, reserved / each.sum())).astype(np.int64)
