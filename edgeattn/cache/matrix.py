"""Which storage, eviction and head classes go together: every triple is either tested or refused with a reason."""
from dataclasses import dataclass
from itertools import product

from edgeattn.cache.options import RELEASING, CacheOptions, evictions
from edgeattn.policies import load_policy, policy_names

FLOATS = "16 bits"  # the row of pages that are not quantised


@dataclass(frozen=True)
class Cell:
    """One triple; `refused` is the reason, empty where it works."""
    storage: str
    eviction: str
    heads: str
    refused: str = ""

    def options(self, **more) -> CacheOptions:
        """Its CacheOptions; ValueError where it is refused."""
        kind = "f16" if self.storage == FLOATS else "int4"
        own = "" if self.storage == FLOATS else load_policy("storage", self.storage).keys
        return CacheOptions(**dict(k_type=own or kind, v_type=kind, storage="kivi" if self.storage == FLOATS else self.storage,
                                   budget=None if self.eviction == "none" else 1 << 24, eviction=self.eviction, heads=self.heads) | more)


def matrix() -> list[Cell]:
    found = []
    methods = "none", *evictions(), RELEASING
    for storage, eviction, heads in product((FLOATS, *policy_names("storage")), methods, ("none", *policy_names("heads"))):
        cell = Cell(storage, eviction, heads)
        try:
            cell.options()
            found.append(cell)
        except ValueError as error:
            found.append(Cell(storage, eviction, heads, str(error)))
    return found
