"""edgeattn.json, what an exported folder says of itself, and whether that is true of its graph."""
from pathlib import Path

from edgeattn.folder import inside, read_json
from edgeattn.graph import Graph, attributes
from edgeattn.ops import DOMAIN

NUMBERS = {"vocab_size": (1, 1 << 24), "hidden_size": (1, 1 << 24), "num_layers": (1, 1 << 16), "num_heads": (1, 1 << 16),
           "kv_heads": (1, 1 << 16), "head_dim": (1, 4096), "window": (0, 1 << 30), "ctx_size": (1, 1 << 30), "max_position": (1, 1 << 30)}
DEFAULTS = {"ubatch": (1, 1 << 16), "threads": (0, 1 << 12)}
OBJECTS = "model", "defaults", "files", "weights", "source", "verify"  # the first two are looked into below
MOST_ENDS = 1024  # end tokens
MOST_TEXT = 255   # characters


def read_config(folder: Path) -> dict:
    """edgeattn.json of an exported folder; ValueError when it is missing, broken, from a newer version, or names files elsewhere."""
    path = inside(folder, "edgeattn.json")
    if not path.is_file():
        raise ValueError(f"{folder}: no edgeattn.json there; make the folder with `edgeattn export CHECKPOINT -o {folder}`")
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; export the model again") from None
    if config.get("format_version") != 1:
        raise ValueError(f"{path}: format version {str(config.get('format_version'))[:20]}, this edgeattn reads version 1; "
                         "export the model again")
    for name in OBJECTS:
        if not isinstance(config.setdefault(name, {}), dict):
            raise ValueError(f"{path}: {name} must be an object, got {str(config[name])[:40]}; export the model again")
    source = config["source"]
    for name, found in {"architecture": config.get("architecture"), "precision": config.get("precision"),
                        "source's name": source.get("name", ""), "source's folder": source.get("folder", "")}.items():
        if not isinstance(found, str) or not found.isprintable() or len(found) > MOST_TEXT:  # it is shown in terminals
            raise ValueError(f"{path}: {name} must be a short text, got {str(found)[:40]!r}; export the model again")
    _check_numbers(path, config["model"], NUMBERS)
    _check_numbers(path, config["defaults"], DEFAULTS)
    if not isinstance(config["defaults"].get("kv_type"), str):
        raise ValueError(f"{path}: kv_type must be the name of a type; export the model again")
    ends = config["model"].get("eos_token_ids", [])
    if not isinstance(ends, list) or len(ends) > MOST_ENDS or not all(type(i) is int for i in ends):
        raise ValueError(f"{path}: eos_token_ids must be a list of token ids; export the model again")
    for name in config.get("files", {}):
        inside(folder, name)
    return config


def _check_numbers(path, found, wanted):
    for name, (least, most) in wanted.items():
        if type(found.get(name)) is not int or not least <= found[name] <= most:
            raise ValueError(f"{path}: {name} must be a whole number from {least} to {most}, got {str(found.get(name))[:40]}; "
                             "export the model again")


def check_graph(graph: Graph, model: dict) -> None:
    """Whether the graph is of the sizes that edgeattn.json's `model` tells, by which memory is allocated and token ids are let through.
    ValueError names what is not. Whether nodes fit each other, contract.py checks."""
    layers = []
    for node in graph.proto.graph.node:
        if node.domain == DOMAIN and node.op_type.startswith("embedding"):
            known = attributes(node)["N"] if "N" in attributes(node) else _rows(graph, node, 1)
            _require(graph, node, "tokens", known, model["vocab_size"])
        elif node.domain == DOMAIN and node.op_type == "cached_attention":
            about = attributes(node)
            layers.append(about.get("layer"))
            for name in ("num_heads", "kv_heads", "head_dim"):
                _require(graph, node, name, about.get(name), model[name])
            _require(graph, node, "positions", min(_rows(graph, node, 3), _rows(graph, node, 4)), model["ctx_size"], more=True)
    if sorted(map(str, layers)) != sorted(map(str, range(model["num_layers"]))):
        raise ValueError(f"{graph.folder}: model.onnx has {len(layers)} attention layers, which are not the {model['num_layers']} of "
                         "edgeattn.json; export the model again")


def check_logits(graph: Graph, values: dict, model: dict) -> None:
    """Whether the plan's `values` hold a row of logits for each row that is asked for. ValueError: they do not."""
    found = values.get("logits")
    if found is None or (found.shape, str(found.dtype)) != (("rows", model["vocab_size"]), "float32"):
        raise ValueError(f"{graph.folder}: model.onnx makes no logits of {model['vocab_size']} tokens; export the model again")


def _rows(graph, node, i):
    """Of the node's input i, an initializer; 0 when it is none."""
    table = graph.initializers.get(node.input[i]) if i < len(node.input) else None
    return 0 if table is None or not table.ndim else len(table)


def _require(graph, node, what, found, wanted, more=False):
    if type(found) is not int or found < wanted or found > wanted and not more:
        raise ValueError(f"{graph.folder}: {node.name[:80]!r} of model.onnx has {str(found)[:40]} {what}, edgeattn.json tells of {wanted}; "
                         "export the model again")
