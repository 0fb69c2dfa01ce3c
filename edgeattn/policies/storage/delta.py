"""Keys as deltas, after DeltaLLM (arXiv 2507.19608), for prefill and decode: what hardly moved since it was last written is left out.

A sealed page holds its first key whole; of the others a block of channels is written only where one of them is further than Theta from the
values written last. What reads the page takes those for the rest of the chain, so that implied keys are never further off than Theta, and
scores by at most Theta times the sum of |q|. Comparing with the key before would be cheaper and let small steps add up without bound.

Deltas are between keys after rotary, since only there a running sum of products is a score. The chain restarts in every page, so that pages
stay independent. Theta is one number for a page: with one for each channel, nano loses several times as much (in KL divergence) for as many
deltas left out, because an error counts by its size, whatever the channel's own.
"""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Delta(StoragePolicy):
    """
    threshold  Theta over the root mean square of the page's keys
    gate       channels that are written together: 1, 8 or 16 (a vector), or 0: all of a token
    refresh    a page that would leave out a smaller share is kept whole, in 16 bits, as it would not pay
    """
    threshold: float = 1.3
    gate: int = 16
    refresh: float = 0.3
    keys = "delta"

    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, "delta", v_type, threshold=self.threshold, gate=self.gate, refresh=self.refresh)]
