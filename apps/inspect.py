"""edgeattn inspect: what an exported folder holds, and which cache options go together."""
import argparse
import json
from pathlib import Path

HELP = "show what an exported folder holds: configuration, weight formats, operators, check figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="an exported folder")
    parser.add_argument("--matrix", action="store_true", help="print which KV storage, eviction and head classes go together")
    parser.add_argument("--check", action="store_true", help="read every file and compare its sha256 with the recorded one")
    parser.add_argument("--json", action="store_true", help="print edgeattn.json as it is")


def main(args: argparse.Namespace) -> int:
    if args.matrix:
        return _matrix()
    if args.folder is None:
        raise ValueError("give an exported folder, or --matrix")
    from edgeattn.runtime import read_config
    folder = Path(args.folder)
    config = read_config(folder)
    if args.json:
        print(json.dumps(config, indent=1))
        return 0
    from edgeattn.apps.export import summary
    from edgeattn.apps.terminal import count, size
    from edgeattn.apps.weights import Weights
    print(summary(folder))
    defaults = ", ".join(f"{name} {value}" for name, value in config["defaults"].items())
    print(f"target {config['target']}: {defaults}")
    weights = Weights(folder)
    print(f"\nweights ({size(weights.token_bytes)} read for each token)")
    for kind, (tensors, params, total) in weights.by_format().items():
        print(f"  {kind:<10} {tensors:>4} tensors  {count(params):>9} parameters  {size(total):>10}")
    print("\noperators")
    for name, n in weights.nodes.most_common():
        print(f"  {name:<20} {n:>4}")
    return _check(folder, config["files"]) if args.check else 0


def _matrix():
    """A line for each storage and head class: the eviction methods that work with them; then what is refused, and why."""
    from edgeattn.cache.matrix import matrix
    from edgeattn.policies import load_policy, policy_names
    cells, refused = matrix(), {}
    for storage, heads in dict.fromkeys((c.storage, c.heads) for c in cells):
        row = [c for c in cells if (c.storage, c.heads) == (storage, heads)]
        print(f"--kv-storage {storage:<10} --kv-heads {heads:<6} --kv-eviction {' '.join(c.eviction for c in row if not c.refused)}")
    for c in cells:
        if c.refused:
            refused.setdefault(c.refused, []).append(f"{c.storage} + {c.eviction} + {c.heads}")
    for reason, triples in refused.items():
        print(f"\nrefused: {', '.join(triples)}\n  {reason}")
    from edgeattn.cuda_limits import matrix_lines
    print("\n" + "\n".join(matrix_lines()))
    works = sum(not c.refused for c in cells)
    print(f"\n--sparse-attention {' '.join(policy_names('decode'))}")
    print(f"\n--sparse-prefill {' '.join(policy_names('prefill'))}")
    for name in policy_names("decode"):
        if getattr(load_policy("decode", name), "shared", False):
            print(f"  {name}: layers share what they read, which --kv-eviction, --kv-heads and storages that sort tokens would mix up")
    print(f"\n{works} of {len(cells)} combinations work with any -ctk and -ctv; {len(cells) - works} are refused before a model is loaded")
    return 0


def _check(folder, files):
    """Compare every file with its recorded hash; 1 when one differs."""
    from edgeattn.exporters.check import sha256
    print("\nfiles")
    wrong = 0
    for name, recorded in files.items():
        path = folder / name
        state = "missing" if not path.is_file() else "ok" if sha256(path) == recorded else "CHANGED"
        wrong += state != "ok"
        print(f"  {name:<28} {state}")
    return 1 if wrong else 0
