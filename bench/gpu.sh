#!/usr/bin/env bash
# Everything that needs a GPU: `bench/gpu.sh`, or some parts of it, `bench/gpu.sh build test`.
#
#   build      compiles the kernels for the GPU at hand and installs the package in place
#   test       the ops' tests on the GPU
#   video      the video decoder's tests on the GPU; only if named: needs av and nvidia-dali too
#   sanitize   memcheck and racecheck of compute-sanitizer on small cases
#   attention  timings, see bench/gpu.py; they go to bench/results/gpu.json
#   loss       timings
#   table      prints the table of results
#
# Needs nvcc, torch with CUDA, transformers, pytest, ninja and pybind11; fetches nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
CLIPVIP_COMMIT=${CLIPVIP_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export CLIPVIP_COMMIT PATH=$PATH:/usr/local/cuda/bin

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  [ "$arch" = 90 ] && arch=90a
  CLIPVIP_CUDA=1 CMAKE_CUDA_ARCHITECTURES=$arch-real \
    python -m pip install -q -e . --no-build-isolation --no-deps
  python -c "from clipvip import _C; print('built for', _C.build_info())"
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: skipped, compute-sanitizer is not installed"
    return
  fi
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 python bench/gpu.py check
  done
}

[ $# -gt 0 ] || set -- build test sanitize attention loss table
for part in "$@"; do
  echo "== $part"
  case $part in
    build | sanitize) $part ;;
    test) python -m pytest -q -rs tests/ops -k cuda ;;
    video) python -m pytest -q -rs tests/data/test_dali.py -k gpu ;;
    attention | loss | table) python bench/gpu.py "$part" ;;
    *) echo "bench/gpu.sh: no part '$part'; see its first lines" >&2; exit 2 ;;
  esac
done
