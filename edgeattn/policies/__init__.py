"""Sparse-attention and KV-compression methods, one file each.

A decode policy names operators and never computes arrays: its operators write a selection, a page list of fixed capacity
plus a count per sequence and KV head, in the device's memory; cached_attention reads it. So a policy adds no Python to a step and
also runs inside a CUDA graph.
"""
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import ClassVar


@dataclass(frozen=True)
class MethodOptions:
    """Which method of a kind is used, and where it begins.

    method   "off", or a file of policies/<kind>; "auto" is what a user gets, and gives way where it does not go with the cache
    options  its fields, where they are not to be the defaults
    min_len  tokens in the context from which it is sparse
    ValueError: an unknown method or field, or a number out of range.
    """
    method: str = "auto"
    options: dict = field(default_factory=dict)
    min_len: int | None = None

    kind: ClassVar[str]  # which policies
    what: ClassVar[str]  # the same in words

    def __post_init__(self):
        known = ("off", *policy_names(self.kind))
        if self.method not in known:
            raise ValueError(f"{self.what} must be one of {', '.join(known)}, got {self.method!r}")
        if self.min_len is not None and self.min_len < 0:
            raise ValueError(f"{self.what} begins at 0 tokens or more, got {self.min_len}")
        self.policy()

    def policy(self):
        """None where everything is read."""
        return None if self.method == "off" else load_policy(self.kind, self.method, self.options)


def load_policy(kind: str, name: str, options: dict | None = None):
    """The policy in policies/<kind>/<name>.py; its class is the file's name in capitals. ValueError when there is none."""
    try:
        module = import_module(f"edgeattn.policies.{kind}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"edgeattn.policies.{kind}.{name}":
            raise
        raise ValueError(f"no {kind} policy named {name!r}; known: {', '.join(policy_names(kind))}") from None
    made, options = getattr(module, "".join(part.capitalize() for part in name.split("_"))), options or {}
    known = [field.name for field in fields(made)]
    if set(options) - set(known):
        raise ValueError(f"{name} has no option {sorted(set(options) - set(known))[0]!r}; it has: {', '.join(known)}")
    return made(**options)


def policy_names(kind: str) -> list[str]:
    from pkgutil import iter_modules
    return sorted(m.name for m in iter_modules(import_module(f"edgeattn.policies.{kind}").__path__))
