"""What a user gets."""
from dataclasses import dataclass

from edgeattn.policies.prefill.streaming import Streaming


@dataclass(frozen=True)
class Auto(Streaming):
    pass
