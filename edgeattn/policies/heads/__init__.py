"""Methods by which KV heads that look up nothing far away keep only the beginning and recent tokens, one file each.

Which heads those are, calibration.py finds on the model itself; all others keep everything. A streaming head keeps its first page and,
at their original positions, recent tokens; what lies between it drops, page by page.
"""
from typing import Protocol


class HeadPolicy(Protocol):
    """A frozen dataclass of options.

    compensated  whether a head's dropped tokens are stood for by their mean key and value (kernels_cpu/attention_compensation.py)
    """
    compensated: bool

    def recent(self, context: int) -> int:
        """Recent tokens that a streaming head keeps at least, where those that keep everything hold `context` tokens."""
