"""Which families can be exported: every other file of this folder is one, with a `describe`, and its name is the model_type."""
from importlib import import_module
from pkgutil import iter_modules

from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.decoder import Decoder

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings")
LARGEST = 1 << 24  # of a size: no model comes near


def families() -> list[str]:
    """The model_types that can be exported."""
    return sorted(m.name for m in iter_modules(__path__))


def read_architecture(source: Checkpoint) -> Decoder:
    """The decoder that a checkpoint's config describes. ValueError for an unknown model_type or an unsupported feature."""
    kind, path = source.config.get("model_type"), source.described_by
    if kind not in families():
        raise ValueError(f"{path}: unknown model_type {kind!r}; supported: {families()}")
    try:
        _check_sizes(source.config, len(source.tensors))
        return import_module(f"{__name__}.{kind}").describe(source.config)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: a value is of the wrong kind ({error})") from None


def _check_sizes(config, tensors):
    """Sizes must be whole numbers, and small enough for nothing to be allocated that the tensors could not fill."""
    for name in SIZES:
        value, most = config.get(name), tensors if name == "num_hidden_layers" else LARGEST
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {str(value)[:40]}")
