"""edgeattn estimate: the memory that a model will take here, told before it reads a token."""
import argparse
import json
import sys
import time

from edgeattn.apps import options

HELP = "predict the memory that a model and its KV cache take with a full context, without running it"
COMPILED = 5  # seconds of loading that say that kernels were compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help="bytes, as one JSON object")


def main(args: argparse.Namespace) -> int:
    from edgeattn.apps import models
    from edgeattn.memory_estimate import estimate
    start = time.perf_counter()
    model, _ = models.load(args)
    if time.perf_counter() - start > COMPILED:
        print("kernels were compiled just now, which took memory: ask again for what a run will take", file=sys.stderr)
    found = estimate(model)
    print(json.dumps(found.as_dict()) if args.json else "\n".join(_lines(model, found)))
    return 0


def _lines(model, found):
    from edgeattn.apps.terminal import size
    about = model.config["model"]
    yield (f"{model.config['architecture']} {model.config['precision']}, {about['num_layers']} layers, {about['kv_heads']} of "
           f"{about['num_heads']} heads keep keys and values, cache {model.cache.options.name}, {model.ctx_size} tokens, on {model.device}")
    parts = {"weights": found.weights, "KV cache, pages": sum(found.kv_layers), "KV cache, lists and indexes": found.kv_state,
             "workspace": found.workspace, "Python, libraries, compiled code": found.runtime, "in all": found.total}
    for name, number in parts.items():
        yield f"  {name:<34}{size(number):>12}"
    yield _layers(found.kv_layers, size)
    yield f"a token more in the cache: {size(found.token_bytes)}"
    where, free = ("this GPU" if found.on_device else "this machine"), found.available
    needed = found.on_device or found.total - found.runtime  # Python and libraries are there already
    yield f"{where} has {size(free)} free: {'enough' if needed <= free else 'NOT enough; a smaller -c, --kv-bits or --kv-budget helps'}"


def _layers(layers, size):
    if len(set(layers)) == 1:
        return f"each layer's pages: {size(layers[0])}"
    return "pages by layer: " + ", ".join(f"{i}: {size(number)}" for i, number in enumerate(layers))
