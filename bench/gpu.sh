#!/usr/bin/env bash
# Everything that a GPU is needed for, in parts that each end well within ten minutes:
#
#   bench/gpu.sh [--out DIR] [--resume DIR] [--wheels DIR] [--commit ID] [--dry-run] [PART …]
#
#   targets  checks all kernels at small sizes; times attention of B/16 and B/32 at 32 videos and the
#            symmetric loss of 16k and 64k rows
#   step     the whole post-pretraining step of B/16, 12 frames, 32 videos, with a profiler's trace;
#            hardware counters of our kernels by ncu
#   tests    the GPU tests; memcheck, racecheck and synccheck of our kernels by compute-sanitizer
#   sweep    all other cases, the most important ones first, until time is up
#
# Without a PART all of them, in this order. Each begins with the build, about a minute on 16 cores.
# A part that fails does not keep the next ones from running; the status is then 1.
#
#   --out DIR      where everything is written: gpu.jsonl (a record per case, as it is measured),
#                  report.md and report.html, traces/, kernels.ncu-rep and .csv, gpu-tests.txt,
#                  sanitizer.txt; by default the variable OUT, else bench/results
#   --resume DIR   what an earlier call wrote: its cases are taken from there, not measured again
#   --wheels DIR   wheels to install first, beside this checkout, where there is no network
#   --commit ID    which commit this is, where git is absent; the variable CLIPVIP_COMMIT, too
#   --dry-run      the same at tiny sizes on the CPU, with the package as it is installed
#
#   bench/gpu.sh wheels DIR [PACKAGE …]   fetches the wheels that a machine with only torch,
#                  transformers, accelerate and pytest lacks, for Python 3.12 (PYTHON_VERSION) on
#                  x86-64, 36 MB; besides PACKAGEs such as nvidia-dali-cuda130, 200 MB
#
# Needs nvcc (CUDA 12.8 or newer), a C++ compiler, and to build setuptools >= 77, cmake, ninja and
# pybind11. PYTHON names the interpreter. Peers that are not installed are left out by name.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
out=${OUT:-bench/results} resume='' device=cuda quick=() bench_resume=()
LACKING=(av omegaconf webdataset braceexpand tyro docstring-parser shtab typeguard lmdb)
PEERS=(inf-cl memeff siglip-kernel)

die() {
  echo "bench/gpu.sh: $*" >&2
  exit 2
}

fetch_wheels() {
  local to=$1 platforms=() minor
  shift
  for minor in 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  mkdir -p "$to"
  # omegaconf's parser is published as source alone.
  "$PYTHON" -m pip wheel -q --no-deps -w "$to" antlr4-python3-runtime==4.9.3
  "$PYTHON" -m pip download -q --no-deps -d "$to" --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" \
    --platform manylinux2014_x86_64 "${LACKING[@]}" "${PEERS[@]}" "$@"
  du -sh "$to"
}

install_wheels() {
  "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target build/gpu-wheels "$1"/*.whl
  export PYTHONPATH=$here/build/gpu-wheels${PYTHONPATH:+:$PYTHONPATH}
}

build() {
  local arch
  if [ $device = cpu ]; then return; fi
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  [ "$arch" = 90 ] && arch=90a
  CLIPVIP_CUDA=1 CMAKE_CUDA_ARCHITECTURES=$arch-real \
    "$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps
  "$PYTHON" -c "from clipvip import _C; print('built for', _C.build_info())"
}

# Before minutes are spent: what is missing, in one line.
needs() {
  "$PYTHON" - "$@" <<'PYTHON'
import importlib.util
import sys

missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{', '.join(missing)} missing: see --wheels in the first lines of bench/gpu.sh")
PYTHON
}

bench() {
  "$PYTHON" -m clipvip.cli bench "$@" --device $device "${quick[@]}" \
    --out "$out/gpu.jsonl" "${bench_resume[@]}"
}

targets() {
  needs tyro psutil pytest_benchmark || return 1
  "$PYTHON" bench/kernels.py check --device $device || return 1
  bench ops --minutes 6 --only "$targets_only"
}

step() {
  needs tyro av omegaconf webdataset || return 1
  local failed=0
  bench train --minutes 5 --only "$step_only" --profile ours || failed=1
  counters
  return $failed
}

# Some machines do not let anyone read the counters: that is no failure of ours.
counters() {
  if [ $device = cpu ] || ! command -v ncu >/dev/null; then
    echo "counters: skipped, there is no ncu or no GPU"
    "$PYTHON" bench/kernels.py run --device $device --tiny
    return
  fi
  timeout -k 10 120 ncu --clock-control none --set full --kernel-name-base mangled \
    -k regex:clipvip -f -o "$out/kernels" "$PYTHON" bench/kernels.py run &&
    ncu --import "$out/kernels.ncu-rep" --csv --page raw >"$out/kernels.csv" ||
    echo "counters: ncu could not read them here; its message is above"
}

tests() {
  local failed=0
  timeout -k 10 240 "$PYTHON" -m pytest -q -rs -m gpu --maxfail=5 --durations=10 \
    --continue-on-collection-errors tests 2>&1 | tee "$out/gpu-tests.txt" || failed=1
  sanitize 2>&1 | tee "$out/sanitizer.txt" || failed=1
  return $failed
}

# Every tensor is an allocation of its own, so that what lies behind it is no other tensor's.
sanitize() {
  local tool failed=0
  if [ $device = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: skipped, there is no compute-sanitizer or no GPU"
    return
  fi
  for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 60 compute-sanitizer --tool $tool \
      --kernel-name kns=clipvip --error-exitcode 9 "$PYTHON" bench/kernels.py check || failed=1
  done
  return $failed
}

sweep() {
  needs tyro av omegaconf webdataset || return 1
  bench all --minutes 7 --only "$sweep_only"
}

if [ "${1:-}" = wheels ]; then
  [ $# -ge 2 ] || die "wheels needs a folder: bench/gpu.sh wheels DIR [PACKAGE …]"
  shift
  fetch_wheels "$@"
  exit
fi

targets_only='(b16|b32)-bf16-batch32-|symmetric-bf16-(16384|65536)-'
step_only='b16-bf16-batch32'
sweep_only=''
parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) device=cpu ;;
    --out | --resume | --wheels | --commit)
      [ $# -ge 2 ] || die "$1 needs a value"
      case $1 in
        --out) out=$2 ;;
        --resume) resume=$2 ;;
        --wheels) install_wheels "$2" ;;
        --commit) export CLIPVIP_COMMIT=$2 ;;
      esac
      shift
      ;;
    targets | step | tests | sweep) parts+=("$1") ;;
    -h | --help) sed -n '2,/^set /{/^set /!p}' "$0" | sed 's/^# \?//'; exit ;;
    *) die "no part or option '$1'; see bench/gpu.sh --help" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(targets step tests sweep)
[ $device = cuda ] || { quick=(--quick); targets_only=b32-bf16; step_only=''; sweep_only='^ops'; }
if [ -n "$resume" ]; then
  [ -e "$resume/gpu.jsonl" ] || die "--resume is $resume, which holds no gpu.jsonl"
  bench_resume=(--resume "$resume/gpu.jsonl")
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

failed=
for part in "${parts[@]}"; do
  echo "== $part"
  build
  "$part" || failed+=" $part"
done
[ -z "$failed" ] || { echo "bench/gpu.sh: failed:$failed" >&2; exit 1; }
