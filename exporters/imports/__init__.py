"""Checkpoints that were quantised before: one file for each `quant_method`, with

    check(about)                           refuses, by ValueError, a quantization_config that cannot be read
    read_weight(checkpoint, name, shape)   matrix `name` (without its ".weight") as a Weight, or None when it is plain floats
"""
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType


def methods() -> list[str]:
    """The values of quant_method that can be read."""
    return sorted(m.name for m in iter_modules(__path__) if hasattr(import_module(f"{__name__}.{m.name}"), "read_weight"))


def find(config: dict, path: Path) -> ModuleType | None:
    """The file that reads what config.json (at `path`) says was done to the weights; None for plain floats."""
    about = config.get("quantization_config")
    if not about:
        return None
    method = about.get("quant_method") if isinstance(about, dict) else None
    if method not in methods():
        raise ValueError(f"{path}: already quantised by {method!r}, which cannot be read; supported: {methods()}, or give the float16 or "
                         "bfloat16 checkpoint")
    module = import_module(f"{__name__}.{method}")
    try:
        module.check(about)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: quantization_config: {error}") from None
    return module


def whole(about: dict, *names: str) -> int:
    """The first of these settings that is there, a whole number."""
    found = [about[name] for name in names if about.get(name) is not None]
    if not found or type(found[0]) is not int:
        raise ValueError(f"{names[0]!r} must be a whole number, got {found[0] if found else None!r}")
    return found[0]
