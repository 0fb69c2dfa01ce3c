"""What `edgeattn estimate` promises beside the peak that a prompt which fills the context takes, each in a process of its own.

    python benchmarks/memory.py FOLDER -c 4096

The prompt runs twice: the first compiles kernels, which takes memory once.
"""
import argparse
import json
import subprocess
import sys

SETTINGS = ("", "--kv-bits 8", "--kv-bits 4", "-ctk int8 -ctv int2", "--kv-bits 4 --sparse-attention off --sparse-prefill off", "-ub 128",
            "--kv-budget {half}", "--kv-bits 4 --kv-budget {half} --kv-eviction snapkv")
SPARE = 64  # tokens that the prompt leaves of the context


def command(*arguments) -> dict:
    """JSON of an edgeattn command."""
    done = subprocess.run([sys.executable, "-m", "edgeattn.apps.cli", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    found = json.loads(done.stdout)
    return found[0] if isinstance(found, list) else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("-c", type=int, default=4096, help="tokens of context (4096)")
    parser.add_argument("--setting", action="append", help="flags in one argument, instead of those that are tried; {half} is half of "
                        "what the 16-bit cache takes")
    args = parser.parse_args()
    dense = command("estimate", "-m", args.folder, "-c", args.c, "--json")
    print("| setting | estimate, MiB | measured peak, MiB | off by |\n|---|---:|---:|---:|")
    for setting in args.setting or SETTINGS:
        flags = ["-m", args.folder, "-c", args.c, *setting.format(half=dense["kv"] // 2).split()]
        prompt = ["bench", *flags, "-p", args.c - SPARE, "-n", 0, "-r", 1, "-o", "json"]
        command(*prompt)
        told, peak = command("estimate", *flags, "--json")["total"], command(*prompt)["peak_rss_bytes"]
        print(f"| `{setting or 'the defaults'}` | {told / 2**20:.0f} | {peak / 2**20:.0f} | {told / peak - 1:+.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
