"""Whether the device profile of `edgeattn tune` makes a model slower than the defaults: both in turns, in processes of their own.

    edgeattn tune -m FOLDER && python benchmarks/tuned.py FOLDER

Ratios are the profile's time to that of the defaults: median, and its 98 % interval. The exit code is 1 where a median is above 1.03 and
its whole interval above 1. A profile that holds nothing but the defaults is timed too: both are then the same, which shows what noise does.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

from edgeattn import device_profile, tuning
from edgeattn.apps.tune import default_setting
from edgeattn.kernels_cpu import PROFILE

LONGEST = 180  # seconds of a model, after which no more rounds than the least are begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="an exported folder")
    parser.add_argument("-r", type=int, default=40, help="rounds (40)")
    parser.add_argument("--setting", metavar="FIELD=VALUE", action="append", default=[], help="another setting in place of the profile's, "
                        "such as ubatch=1024")
    args = parser.parse_args()
    slower = False
    print("| model | setting | workload | time against the defaults | rounds |\n|---|---|---|---:|---:|")
    for folder in args.folders:
        default, _, config = default_setting(folder)
        chosen = device_profile.part(PROFILE, "models").get(device_profile.shape(config), {})
        chosen = dict(chosen, level=device_profile.read(PROFILE).get("level") or default.level)
        for text in args.setting:
            name, _, value = text.partition("=")
            chosen[name] = value if name == "level" else int(value)
        tuned = replace(default, **chosen)
        times = tuning.turns((default, tuned), lambda setting: tuning.Worker(folder, setting),
                             lambda times, spent: len(times) >= args.r or spent > LONGEST and len(times) >= tuning.ROUNDS[0])
        for name, values in tuning.ratios(times).items():
            low, middle, high = tuning.interval(values)
            slower |= middle > tuning.LOSS and low > 1
            what = f"{tuned.threads} threads, -ub {tuned.ubatch}, {tuned.level}" + (" (the defaults)" if tuned == default else "")
            print(f"| {device_profile.shape(config)} | {what} | {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {len(values)} |",
                  flush=True)
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
