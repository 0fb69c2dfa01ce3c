"""Keys and values by token, keys rotated so that outlier channels are spread (QuaRot, arXiv 2404.00456)."""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Hadamard(StoragePolicy):
    rotated = True

    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type, k_axis="token")]
