"""What a user chooses about the KV cache."""
from dataclasses import dataclass

from edgeattn.cache.layer_budget import RULES
from edgeattn.page_formats import BITS
from edgeattn.policies import load_policy, policy_names

LAYER_BUDGETS = ("uniform", *RULES)
DEFAULT_EVICTION = "key_diff"
RELEASING = "adore"  # drops whole pages, which are computed again when they are asked for


def evictions() -> list[str]:
    """Methods that can be chosen by name and score tokens: nats needs token types, which only a checkpoint brings; RELEASING is another
    kind."""
    return [name for name in policy_names("eviction") if name not in ("nats", RELEASING)]


@dataclass(frozen=True)
class CacheOptions:
    """
    k_type, v_type  f32, f16, int8, int4, int3 or int2: how whole pages of keys and values are kept; the first page, the last `window`
                    tokens and the page being filled stay in 16 bits (or 32). "auto": the export's type, or with a budget the widest
                    type in which the whole context fits, int4 at least
    storage         how codes are made: a file of policies/storage
    budget          bytes that the cache may take in all, a hard limit; None: as many as ctx_size needs
    eviction        which tokens go when the budget is full: a file of policies/eviction, or "none": then the cache is full. "auto":
                    DEFAULT_EVICTION where there is a budget
    sink_tokens     first tokens that are never evicted
    window          newest tokens that are never evicted nor quantised, a multiple of 32
    heads           "none", or a file of policies/heads: what KV heads keep that look nothing up. Needs calibration (calibration.py)
    retrieval       share of the KV heads that keep everything
    layer_budget    how layers share what eviction leaves: "uniform", or a rule of layer_budget.py
    progressive     of int8 keys a decode step reads the high four bits alone where the step before was certain: where the largest
                    attention weight of each query head was at least this (SpAtten, arXiv 2012.09852); 0 is off
    delta_threshold, delta_gate, delta_refresh   of storage "delta", whose keys have the type of that name: policies/storage/delta.py
    ValueError: an unknown name, a number out of range, or a pair that does not compose.
    """
    k_type: str = "auto"
    v_type: str = "auto"
    storage: str = "kivi"
    budget: int | None = None
    eviction: str = "auto"
    sink_tokens: int = 4
    window: int = 64
    heads: str = "none"
    retrieval: float = 0.5
    layer_budget: str = "uniform"
    progressive: float = 0.0
    delta_threshold: float = 1.3
    delta_gate: int = 16
    delta_refresh: float = 0.3

    def __post_init__(self):
        for name, known in (("k_type", ("auto", *BITS)), ("v_type", ("auto", *(kind for kind in BITS if kind != "delta"))),
                            ("storage", policy_names("storage")), ("eviction", ("auto", "none", RELEASING, *evictions())),
                            ("heads", ("none", *policy_names("heads"))), ("layer_budget", LAYER_BUDGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.sink_tokens <= 32:
            raise ValueError(f"sink_tokens must be 0 to 32 (they stand in the first page), got {self.sink_tokens}")
        if self.window < 32 or self.window % 32:
            raise ValueError(f"window must be a multiple of 32, at least 32, got {self.window}")
        if not 0 <= self.retrieval <= 1:
            raise ValueError(f"retrieval must be a share of the KV heads, 0 to 1, got {self.retrieval}")
        if self.eviction not in ("auto", "none") and self.budget is None:
            raise ValueError(f"eviction {self.eviction!r} needs a budget to keep: give --kv-budget too")
        own = self.storage_policy().keys
        if own and self.k_type not in ("auto", own):
            raise ValueError(f"storage {self.storage!r} has its own type of keys: leave out -ctk and --kv-bits, "
                             "and choose values with -ctv")
        if self.k_type == "delta" != own:
            raise ValueError("keys as deltas are --kv-storage delta: leave out -ctk")
        if not (self.delta_threshold >= 0 and 0 <= self.delta_refresh <= 1 and self.delta_gate in (0, 1, 8, 16)):
            raise ValueError("delta_threshold must be 0 or more, delta_refresh 0 to 1, delta_gate 0, 1, 8 or 16; got "
                             f"{self.delta_threshold}, {self.delta_refresh}, {self.delta_gate}")
        if self.storage != "kivi" and "auto" not in (self.k_type, self.v_type) and not self.quantised:
            raise ValueError(f"storage {self.storage!r} is a way to quantise: choose -ctk and -ctv (or --kv-bits) below 16 bits")
        if self.releases and (self.heads != "none" or self.layer_budget != "uniform"):
            raise ValueError(f"eviction {RELEASING!r} drops pages of all heads together: leave out --kv-heads and layer budgets")
        if self.releases and (self.storage_policy().group > 1 or self.storage_policy().anchors):
            raise ValueError(f"eviction {RELEASING!r} and storage {self.storage!r}, which sorts tokens, do not go together: choose another")
        if not 0 <= self.progressive <= 1:
            raise ValueError(f"progressive must be 0 (off) to 1, an attention weight, got {self.progressive}")
        if self.progressive and self.k_type != "int8":
            raise ValueError(f"progressive reads need keys in two planes of four bits: use -ctk int8, not {self.k_type}")
        if ("f32" in (self.k_type, self.v_type)) and self.k_type != self.v_type:
            raise ValueError("f32 is for both keys and values: give the same type twice")

    @property
    def name(self) -> str:
        """The types in short: f16, int4, int4/f16 (keys, values)."""
        return self.k_type if self.k_type == self.v_type else f"{self.k_type}/{self.v_type}"

    @property
    def quantised(self) -> bool:
        """Whether pages are sealed in another type than tokens are written in."""
        return self.k_type == "delta" or min(BITS[self.k_type], BITS[self.v_type]) < 16

    @property
    def method(self) -> str:
        """The eviction method in use, or "none"."""
        return (DEFAULT_EVICTION if self.budget else "none") if self.eviction == "auto" else self.eviction

    @property
    def moves_slots(self) -> bool:
        """Whether slots may stop being positions: tokens are evicted or sorted."""
        sorts = self.quantised and (self.storage_policy().group > 1 or self.storage_policy().anchors)
        return self.method != "none" or self.heads != "none" or sorts

    @property
    def releases(self) -> bool:
        """Whether whole pages are released and rebuilt."""
        return self.method == RELEASING

    @property
    def shares_layers(self) -> bool:
        """Whether layers share the budget by what they need."""
        return self.layer_budget != "uniform" and self.method != "none"

    @property
    def float_type(self) -> str:
        """The type of what is not quantised."""
        return "f32" if self.k_type == "f32" else "f16"

    @property
    def compensated(self) -> bool:
        """Whether the cache keeps means of what streaming heads drop."""
        return self.heads != "none" and load_policy("heads", self.heads).compensated

    def probing(self) -> list:
        """The policies that ask for attention statistics."""
        users = [self.eviction_policy(), self.storage_policy() if self.quantised else None,
                 RULES[self.layer_budget] if self.shares_layers else None]
        return [user for user in users if user is not None and user.mass]

    def storage_policy(self):
        own = ("threshold", "gate", "refresh") if self.storage == "delta" else ()
        return load_policy("storage", self.storage, {name: getattr(self, f"delta_{name}") for name in own})

    def eviction_policy(self):
        return None if self.method == "none" else load_policy("eviction", self.method)
