#!/bin/sh
# All that shows whether --device cuda works and how fast it is, for a GPU machine that is rented by the minute and where edgeattn is not
# installed, in two parts that take some minutes each:
#   sh benchmarks/cuda_runtime.sh tests [FOLDER FOR LOGS] [PYTEST'S ARGUMENTS]     (with pytest-xdist)
#   sh benchmarks/cuda_runtime.sh figures [FOLDER FOR LOGS]
cd "$(dirname "$0")/.." || exit 1
part=$1 logs=${2:-/tmp/cuda-runtime} made=/tmp/cuda-runtime-exports g="sh benchmarks/gpu.sh"
[ $# -gt 2 ] && shift 2 || shift $#
mkdir -p "$logs" $made
export PYTHONUNBUFFERED=1 EDGEATTN_TEST_EXPORTS=$made
began=$(date +%s); say() { echo "[$(( $(date +%s) - began )) s] $*"; }

build() {  # all cores compile
  pids=""
  for source in kernels_cuda/*.cu; do
    timeout 90 $g python3 -c "from edgeattn.kernels_cuda import compile; compile.module('$(basename "$source" .cu)')" & pids="$pids $!"
  done
  timeout 60 $g python3 benchmarks/random_export.py llama-3.2-1b $made/1b & pids="$pids $!"
  for precision in int4 fp32; do
    [ -d $made/nano-$precision ] || timeout 90 $g python3 -c "
from edgeattn.exporters import export
export.check = lambda *given: {}  # tests check more than it does
export.export('models/nano', '$made/nano-$precision', '$precision')" & pids="$pids $!"
  done
  wait $pids; say built
}

compile_cpu_kernels() {  # what tests compare with
  for kernel in matmul_nbits embedding_nbits rms_normalization add gather_rows gather_columns gated_activation sample cached_attention \
                select_pages seal_pages page_int8 page_int4 rotate_heads key_means attention_prefill_int8 attention_prefill; do
    timeout 180 $g python3 -c "import edgeattn.kernels_cpu.$kernel" >/dev/null 2>&1 &
  done
  wait; say compiled for the CPU too
}

tests() {  # a worker that an illegal address leaves without its GPU ends, and another one goes on
  compile_cpu_kernels
  NUMBA_NUM_THREADS=2 timeout $(( began + 560 - $(date +%s) )) $g python3 -m pytest -p no:cacheprovider -p cuda_faults -n 12 --dist worksteal --max-worker-restart 30 \
    -q --tb=short --durations 15 ${1:+"$@"} tests/test_cuda_[!be]*.py >"$logs/tests.log" 2>&1
  say tests; grep -v '^$' "$logs/tests.log" | tail -150 | cut -c1-200
}

figure() {
  name=$1; shift
  timeout 150 $g python3 "$@" --json "$logs/$name.json" >"$logs/$name.log" 2>&1
  say "$name"; tail -45 "$logs/$name.log" | cut -c1-260
}

build
case $part in
tests) tests "$@" ;;
figures)
  figure decode benchmarks/cuda_decode.py $made/1b -r 30
  figure attention benchmarks/cuda_attention.py --types f16 int4
  figure prefill benchmarks/cuda_prefill.py
  figure kernels benchmarks/cuda_kernels.py ;;
*) echo "wanted: tests or figures" >&2; exit 2 ;;
esac
