#!/usr/bin/env bash
# Everything that needs a GPU: `bench/gpu.sh`, or some parts of it, `bench/gpu.sh build test`.
#
#   build      compiles the kernels for the GPU at hand and installs the package in place
#   test       the ops' tests on the GPU
#   video      the video decoder's tests on the GPU; only if named: needs av and nvidia-dali too
#   decode     clips a second by DALI, torchcodec and PyAV; only if named: needs as video does, the
#              peers (pip install .[peers]), and in .cache/test-clips the films that make test fetches
#   sanitize   memcheck and racecheck of compute-sanitizer on our kernels alone, at small sizes
#   attention  timings, see bench/gpu.py; they go to bench/results/gpu.json
#   loss       timings
#   table      prints the table of results
#
# Needs nvcc (CUDA 12.8 or newer), a C++ compiler, and in Python: torch with CUDA, transformers; to
# build setuptools >= 77, cmake, ninja, pybind11; to test and time pytest, pytest-benchmark, psutil.
# Fetches nothing. PYTHON=… names the interpreter; CLIPVIP_COMMIT=… the commit where git cannot.
# A part that fails does not keep the next ones from running, but for the build.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/cuda/bin
PYTHON=${PYTHON:-python3}

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  [ "$arch" = 90 ] && arch=90a
  CLIPVIP_CUDA=1 CMAKE_CUDA_ARCHITECTURES=$arch-real \
    "$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps
  "$PYTHON" -c "from clipvip import _C; print('built for', _C.build_info())"
}

# Every tensor is an allocation of its own, so that what lies behind it is no other tensor's.
sanitize() {
  local tool failed=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: skipped, compute-sanitizer is not installed"
    return
  fi
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$PYTHON" bench/gpu.py check || failed=1
  done
  return $failed
}

[ $# -gt 0 ] || set -- build test sanitize attention loss table
failed=
for part in "$@"; do
  echo "== $part"
  case $part in
    build) build ;;
    sanitize) sanitize || failed+=" $part" ;;
    test) "$PYTHON" -m pytest -q -rs tests/ops -k cuda || failed+=" $part" ;;
    video) "$PYTHON" -m pytest -q -rs tests/data/test_dali.py -k gpu || failed+=" $part" ;;
    decode)
      "$PYTHON" -m pytest -q -rs bench/bench_decode.py -k gpu && "$PYTHON" bench/bench_decode.py ||
        failed+=" $part"
      ;;
    attention | loss | table) "$PYTHON" bench/gpu.py "$part" || failed+=" $part" ;;
    *) echo "bench/gpu.sh: no part '$part'; see its first lines" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "bench/gpu.sh: failed:$failed" >&2; exit 1; }
