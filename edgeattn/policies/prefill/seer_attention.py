"""SeerAttention (arXiv 2410.13276): a gate that was trained for the model predicts which blocks its attention weighs.

The gate pools queries over 64 tokens by their mean, keys over 64 by maximum, minimum and mean, all before rotary embedding, maps both
linearly by head, rotates the results by the positions of the blocks' first tokens, and takes a softmax over the blocks that a query block
sees. Cached keys are rotated: a rotation with known cos and sin is undone exactly, up to rounding (and up to quantisation, where the cache
has that), as long as key j stands at position j, which holds while a prompt is read. A gate block is two of our pages.
The paper's code also reads everything for a prompt's last two query blocks: a chunk does not know whether it is the last, so not here.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy, double_bits
from edgeattn.prefill_plan import PAGE, QUERIES, best, ends, pool, shape_of, softmax
from edgeattn.reference.cached_attention import rotate

FILE = "seer_attention.safetensors"  # gate_q, gate_k; gate_cos, gate_sin if the gate's rotary tables are not the model's
BLOCK = 64  # keys


@dataclass(frozen=True)
class SeerAttention(PrefillPolicy):
    """
    threshold  blocks with at least this part of a row's gate are read (the authors use 5e-4 to 5e-3)
    fraction   instead, this part of the blocks that a query block sees, the highest; 0: by threshold

    Assets
        gate_q    [layers, heads, head_dim, width]            gate_k  [layers, kv_heads, 3 * head_dim, width]: of maximum, minimum, mean
        cos, sin  [positions, rotary_dim / 2], the model's    gate_cos, gate_sin  [positions, up to width / 2], where they differ
        interleaved  bool: which channels are pairs
    """
    threshold: float = 5e-4
    fraction: float = 0.0

    unrotates: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1 or not 0 <= self.fraction <= 1:
            raise ValueError(f"need threshold and fraction from 0 to 1, got {self.threshold=} {self.fraction=}")

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "threshold": float(self.threshold), "fraction": double_bits(self.fraction)}
        return [("choose_by_gate", about)]

    def device_assets(self, assets):
        """A layer's own rotary tables are there anyway."""
        return {name: x for name, x in assets.items() if name.startswith("gate")}

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        gate = self.gate(q, k, layer, head, assets)
        allowed = visible(n, m)
        if self.fraction:
            kept = best(gate, allowed, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), gate.shape[:2]))
        else:
            kept = (gate >= self.threshold) & allowed
        return np.repeat(kept, BLOCK // PAGE, 2)[..., :shape_of(n, m)[1]]

    def gate(self, q, k, layer, head, assets) -> np.ndarray:
        """[group, query blocks, gate blocks] float32: what the gate expects of the blocks' attention."""
        n, m, group = q.shape[1], len(k), len(q)
        past, table = m - n, (assets["cos"], assets["sin"], bool(assets.get("interleaved", False)))
        pools = pool(unrotate(q, *table, np.arange(past, m)), QUERIES)
        plain = unrotate(k[None], *table, np.arange(m))[0]
        starts = np.arange(0, m, BLOCK)
        found = np.concatenate([np.maximum.reduceat(plain, starts), np.minimum.reduceat(plain, starts), pool(plain, BLOCK)], 1)
        a = pools @ assets["gate_q"][layer, head * group:(head + 1) * group]
        b = found @ assets["gate_k"][layer, head]
        cos, sin = (assets.get(f"gate_{name}", assets[name]) for name in ("cos", "sin"))
        firsts = past + np.arange(0, n, QUERIES)
        a = rotate(a.swapaxes(0, 1), cos[firsts], sin[firsts]).swapaxes(0, 1)
        b = rotate(b[:, None], cos[starts], sin[starts])[:, 0]
        return softmax(np.where(visible(n, m), a @ b.T * np.float32(a.shape[2] ** -0.5), -np.inf))

    def load(self, folder, config):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        from edgeattn.graph import attributes, read_graph
        path, about = Path(folder) / FILE, config["model"]
        if not path.is_file():
            raise ValueError(f"{folder}: no {FILE} there: seer_attention needs a gate that was trained for this model")
        try:
            gate = {name: np.ascontiguousarray(x, np.float32) for name, x in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error})") from None
        width = gate["gate_q"].shape[-1] if "gate_q" in gate else 0
        for name, count, rows in (("gate_q", about["num_heads"], about["head_dim"]), ("gate_k", about["kv_heads"], 3 * about["head_dim"])):
            wanted, got = (about["num_layers"], count, rows, width), gate[name].shape if name in gate else None
            if got != wanted:
                raise ValueError(f"{path}: {name} must be {wanted} for this model, got {got}")
        graph = read_graph(Path(folder))
        node = next(node for node in graph.proto.graph.node if node.op_type == "cached_attention")
        half = attributes(node)["rotary_dim"] // 2
        cos, sin = (graph.initializers[name][:, :half] for name in node.input[3:5])
        gate = {"cos": cos, "sin": sin, "interleaved": attributes(node)["interleaved"]} | gate
        tables = [gate[name] for name in ("gate_cos", "gate_sin") if name in gate]
        if tables and (len(tables) < 2 or tables[0].shape != tables[1].shape or len(tables[0]) < len(cos)):
            raise ValueError(f"{path}: gate_cos and gate_sin must be of one shape, with a row for each of the model's {len(cos)} positions")
        if 2 * gate.get("gate_cos", cos).shape[1] > width:
            raise ValueError(f"{path}: rotary tables of {half} pairs do not fit a gate of {width} channels: add gate_cos and gate_sin")
        return gate

    def of_head(self, assets, head, group):
        return assets | {"gate_q": assets["gate_q"][:, head * group:(head + 1) * group], "gate_k": assets["gate_k"][:, head:head + 1]}

    @staticmethod
    def example_assets(heads: int, kv_heads: int, head_dim: int) -> dict:
        """A gate of one layer that compares means, of a model without positions."""
        identity = np.eye(head_dim, dtype=np.float32)
        none = np.zeros((2 * head_dim, head_dim), np.float32)
        cos = np.broadcast_to(np.float32(1), (1 << 15, head_dim // 2))
        return {"gate_q": np.tile(identity, (1, heads, 1, 1)), "gate_k": np.tile(np.concatenate([none, identity]), (1, kv_heads, 1, 1)),
                "cos": cos, "sin": cos - 1}


def visible(n: int, m: int) -> np.ndarray:
    """[query blocks, gate blocks] bool: blocks with nothing behind what a query block sees. One that straddles its end stands among its
    own tokens, which are read anyway."""
    return np.minimum(np.arange(BLOCK, m + BLOCK, BLOCK), m) <= ends(n, m)[:, None]


def unrotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, positions: np.ndarray) -> np.ndarray:
    """x [heads, tokens, head_dim] before cached_attention rotated it, also with tables that carry a factor (cos² + sin² not 1)."""
    cos, sin = cos[positions], sin[positions]
    size = cos * cos + sin * sin
    return rotate(x.swapaxes(0, 1), cos / size, -sin / size, interleaved).swapaxes(0, 1)
