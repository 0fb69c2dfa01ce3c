"""BitNet a4.8's cache (arXiv 2411.04965): symmetric codes, one step for each token and head. Meant for 3 bits and models trained for it."""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Bitnet(StoragePolicy):
    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type, k_axis="token", one_group=True)]
