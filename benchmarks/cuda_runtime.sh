#!/bin/sh
# All that shows whether --device cuda works and how fast it is, for a GPU machine that is rented by the minute and where edgeattn is not
# installed: sh benchmarks/cuda_runtime.sh [FOLDER FOR LOGS]. Takes about four minutes; groups of tests run beside each other, each in a
# process of its own, because an illegal address ends a process's use of the GPU.
cd "$(dirname "$0")/.." || exit 1
logs=${1:-/tmp/cuda-runtime}; made=/tmp/cuda-runtime-exports; g="sh benchmarks/gpu.sh"
mkdir -p "$logs" $made
export PYTHONUNBUFFERED=1 EDGEATTN_TEST_EXPORTS=$made
began=$(date +%s); say() { echo "[$(( $(date +%s) - began )) s] $*"; }

pids=""
for source in kernels_cuda/*.cu; do  # all cores compile
  timeout 60 $g python3 -c "from edgeattn.kernels_cuda import compile; compile.module('$(basename $source .cu)')" & pids="$pids $!"
done
timeout 60 $g python3 benchmarks/random_export.py llama-3.2-1b $made/1b & pids="$pids $!"
timeout 60 $g python3 -c "
from edgeattn.exporters import export
export.check = lambda *given: {}  # tests check more than it does
export.export('models/nano', '$made/nano-int4', 'int4')" & pids="$pids $!"
wait $pids; say built
for kernel in matmul_nbits embedding_nbits rms_normalization add gather_rows gated_activation sample cached_attention select_pages \
              seal_pages page_int8 page_int4; do
  timeout 120 $g python3 -c "import edgeattn.kernels_cpu.$kernel" >"$logs/compile-$kernel" 2>&1 &
done
timeout 60 $g python3 benchmarks/cuda_decode.py $made/1b --engines ours -r 30 --json "$logs/ours.json" >"$logs/ours.log" 2>&1
failed=$?; say ours; tail -14 "$logs/ours.log"
[ $failed = 0 ] || { kill %% 2>/dev/null; exit 1; }  # nothing else would work
wait; rm -f "$logs"/compile-*; say compiled

test() { NUMBA_NUM_THREADS=2 timeout 90 $g python3 -m pytest -p no:cacheprovider -q -s --tb=short "$@"; }
test tests/test_cuda_host.py >"$logs/host.log" 2>&1 &
for group in "decoded and f16" "decoded and int8" "decoded and int4" together session graph "reference or greedy or budget" commands; do
  test -k "$group" tests/test_cuda_runtime.py >"$logs/$(echo "$group" | tr ' ' '_').log" 2>&1 &
done
wait; say tests
for log in "$logs"/[a-np-z]*.log; do echo "== $log"; grep -v '^$' "$log" | tail -16 | cut -c1-200; done
timeout 100 $g python3 benchmarks/cuda_decode.py $made/1b --engines torch -r 30 --json "$logs/torch.json" >"$logs/torch.log" 2>&1; say torch
tail -4 "$logs/torch.log"
