"""Sparse-attention and KV-compression methods, one file each.

A decode policy names operators and never computes arrays: its operators write a selection, a page list of fixed capacity
plus a count per sequence and KV head, in the device's memory; cached_attention reads it. So a policy adds no Python to a step and
also runs inside a CUDA graph.
"""
from dataclasses import fields
from importlib import import_module


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
