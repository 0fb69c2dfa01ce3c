#!/bin/sh
# Runs a command with this checkout as the package `edgeattn`, for machines where it is not installed: sh benchmarks/gpu.sh python3 -m pytest ...
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
site=${TMPDIR:-/tmp}/edgeattn-$(printf %s "$root" | cksum | cut -d ' ' -f 1)  # always the same: compiled kernels are kept by path
mkdir -p "$site/edgeattn"
for path in "$root"/edgeattn/* "$root"/apps "$root"/exporters "$root"/kernels_cpu "$root"/kernels_cuda; do
  ln -sfn "$path" "$site/edgeattn/${path##*/}"
done
cd "$root"
PYTHONSAFEPATH=1 PYTHONPATH="$site:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}" "$@"  # safe: the checkout itself must not come first
