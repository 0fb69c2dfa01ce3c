"""KIVI (arXiv 2402.02750): keys by channel within a page, values by token."""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Kivi(StoragePolicy):
    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type)]
