#!/bin/sh
# Runs a command with this checkout as the package `edgeattn`, for machines where it is not installed: sh benchmarks/gpu.sh python3 -m pytest ...
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/edgeattn"
ln -s "$root"/edgeattn/* "$site/edgeattn/"
for folder in apps exporters kernels_cpu kernels_cuda; do ln -s "$root/$folder" "$site/edgeattn/$folder"; done
cd "$root"
PYTHONSAFEPATH=1 PYTHONPATH="$site:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}" "$@"  # safe: the checkout itself must not come first
