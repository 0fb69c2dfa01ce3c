"""Sparse-attention and KV-compression methods, one file each.

A decode policy names operators and never computes arrays: its operators write a selection, a page list of fixed capacity
plus a count per sequence and KV head, in the device's memory; cached_attention reads it. So a policy adds no Python to a step and
also runs inside a CUDA graph.
"""
from importlib import import_module
from typing import Protocol


class DecodePolicy(Protocol):
    """What a decode policy file provides: a frozen dataclass of options with these two methods."""

    def capacity(self, max_pages: int) -> int:
        """Pages a selection can hold; 0 when nothing is ever selected (dense)."""

    def before_attention(self, layer: int) -> list[tuple[str, dict]]:
        """(operator, attributes) to run before this layer's attention; none means dense. Their ARGS may name the attention's own
        tensors and attributes, "batch.*", "cache.*" and "selection.*"."""


def load_policy(kind: str, name: str, options: dict | None = None):
    """The policy in policies/<kind>/<name>.py; its class is the file's name in capitals. ValueError when there is none."""
    try:
        module = import_module(f"edgeattn.policies.{kind}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"edgeattn.policies.{kind}.{name}":
            raise
        raise ValueError(f"no {kind} policy named {name!r}; known: {', '.join(policy_names(kind))}") from None
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))(**(options or {}))


def policy_names(kind: str) -> list[str]:
    from pkgutil import iter_modules
    return sorted(m.name for m in iter_modules(import_module(f"edgeattn.policies.{kind}").__path__))
