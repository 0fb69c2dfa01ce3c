"""Whether a device computes right: operators against their references, and a model with each cache and policy against
a dense 16-bit cache."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of a report.

    what     "operator", "export" or "setting"
    name     of the operator; the flags of a setting
    passed   None where there is nothing to check on this device or model: `note` says why
    figures  {name: number}, with the limits that they were held to
    """
    what: str
    name: str
    passed: bool | None
    figures: dict[str, float]
    note: str = ""
