#!/usr/bin/env bash
# Runs everything that needs a GPU, in parts of nine minutes at most:
#
#   bench/gpu.sh [--out DIR] [--resume DIR] [--wheels DIR] [--commit ID] [--dry-run] [PART …]
#
#   targets  checks all kernels at small sizes; times attention of B/16 and B/32 on 32 videos and the
#            symmetric loss of 16k and 64k rows
#   step     times the whole post-pretraining step of B/16, 12 frames, 32 videos, and traces it with
#            PyTorch's profiler; reads hardware counters of our kernels with ncu
#   tests    runs the GPU tests; then memcheck, racecheck and synccheck on our kernels with
#            compute-sanitizer
#   sweep    times all other cases, the most important ones first, until time is up
#
# Without a PART it runs all four in this order. Each starts with the build, which takes about a
# minute on 16 cores. If a part fails, the next ones still run, and the status is 1.
#
#   --out DIR      folder for all results: gpu.jsonl (one record per case, written when the case is
#                  done), report.md and report.html, traces/, kernels.ncu-rep and .csv,
#                  gpu-tests.txt, sanitizer.txt; by default the variable OUT, else bench/results
#   --resume DIR   folder of an earlier call; its cases are copied and not measured again
#   --wheels DIR   wheels to install first, beside this checkout, for a machine without a network
#   --commit ID    commit of this checkout where git is absent; so does the variable CLIPVIP_COMMIT
#   --dry-run      the same at small sizes on the CPU, with the installed package
#
#   bench/gpu.sh wheels DIR [PACKAGE …]
#                  downloads wheels for a machine that has only torch, transformers, accelerate,
#                  pytest, matplotlib and a compiler: 36 MB for Python 3.12 (PYTHON_VERSION) on
#                  x86-64, plus each PACKAGE, such as nvidia-dali-cuda130 (200 MB)
#
# Needs nvcc (CUDA 12.8 or newer) and a C++ compiler; the build also needs setuptools >= 77, cmake,
# ninja and pybind11. PYTHON names the interpreter. Peers that are not installed are left out by name.
set -euo pipefail
self=$(realpath "$0")
from=$PWD
cd "$(dirname "$self")/.."
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
out=$(realpath -m "${OUT:-bench/results}")
device=cuda quick=() earlier=()
LACKING=(av omegaconf webdataset braceexpand tyro docstring-parser shtab typeguard lmdb)
LACKING+=(pytest-benchmark py-cpuinfo psutil)
PEERS=(inf-cl memeff siglip-kernel)
PART_SECONDS=540

die() {
  echo "bench/gpu.sh: $*" >&2
  exit 2
}

in_callers_folder() { (cd "$from" && realpath -m "$1"); }

fetch_wheels() {
  local to platforms=() minor
  to=$(in_callers_folder "$1")
  shift
  for minor in 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  mkdir -p "$to"
  # The parser of omegaconf is published as source only.
  "$PYTHON" -m pip wheel -q --no-deps -w "$to" antlr4-python3-runtime==4.9.3
  "$PYTHON" -m pip download -q --no-deps -d "$to" --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" \
    --platform manylinux2014_x86_64 "${LACKING[@]}" "${PEERS[@]}" "$@"
  du -sh "$to"
}

install_wheels() {
  "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target build/gpu-wheels "$1"/*.whl
  export PYTHONPATH=$PWD/build/gpu-wheels${PYTHONPATH:+:$PYTHONPATH}
}

# within SECONDS COMMAND …: run a command for so many seconds at most, and within the part's time
within() {
  local left=$((part_ends - SECONDS)) limit=$1
  shift
  [ "$limit" -lt $left ] || limit=$left
  [ "$limit" -gt 0 ] || { echo "no time left to run: $*"; return 124; }
  timeout -k 10 "$limit" "$@"
}

build() {
  local arch
  if [ $device = cpu ]; then return; fi
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  [ "$arch" = 90 ] && arch=90a
  CLIPVIP_CUDA=1 CMAKE_CUDA_ARCHITECTURES=$arch-real \
    within 300 "$PYTHON" -m pip install -q -e . --no-build-isolation --no-deps
  "$PYTHON" -c "from clipvip import _C; print('built for', _C.build_info())"
}

# needs PACKAGE …: fail with one line that names the missing packages
needs() {
  "$PYTHON" - "$@" <<'PYTHON'
import importlib.util
import sys

missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}; see --wheels in bench/gpu.sh --help")
PYTHON
}

# bench SECONDS SUITE …: measure as many cases as there is time for
bench() {
  local left=$((part_ends - SECONDS)) limit=$1
  shift
  [ "$limit" -lt $left ] || limit=$left
  "$PYTHON" -m clipvip.cli bench "$@" --device $device "${quick[@]}" --out "$out/gpu.jsonl" \
    "${earlier[@]}" --minutes "$(awk "BEGIN { print $limit / 60 }")"
}

targets() {
  local failed=0
  needs tyro psutil pytest_benchmark av || return 1
  within 90 "$PYTHON" bench/kernels.py check --device $device || failed=1
  bench 380 ops --only "$targets_only" || failed=1
  return $failed
}

step() {
  local failed=0
  needs tyro psutil pytest_benchmark av omegaconf webdataset || return 1
  bench 330 train --only "$step_only" --profile ours || failed=1
  counters
  return $failed
}

# Some machines do not permit reading the counters; that is not a failure.
counters() {
  if [ $device = cpu ] || ! command -v ncu >/dev/null; then
    echo "counters: skipped, since ncu or a GPU is missing"
    within 60 "$PYTHON" bench/kernels.py run --device $device --tiny
  elif ! within 120 ncu --clock-control none --set full --kernel-name-base mangled \
    -k regex:clipvip -f -o "$out/kernels" "$PYTHON" bench/kernels.py run; then
    echo "counters: none, since ncu failed as printed above or exceeded its time"
  else
    within 60 ncu --import "$out/kernels.ncu-rep" --csv --page raw >"$out/kernels.csv" ||
      echo "counters: kernels.ncu-rep could not be converted to kernels.csv"
  fi
}

tests() {
  local failed=0 where=(tests/ops tests/model/test_layers.py tests/test_losses.py)
  if needs av omegaconf webdataset lmdb; then where+=(tests/training tests/data); fi
  # Output goes to a file: a process that a test leaves running would keep a pipe open.
  within 240 timeout -s INT 230 "$PYTHON" -m pytest -v --tb=short -rs -m gpu --maxfail=5 \
    --durations=10 -o faulthandler_timeout=100 --continue-on-collection-errors "${where[@]}" \
    >"$out/gpu-tests.txt" 2>&1 || failed=1
  tail -n 60 "$out/gpu-tests.txt"
  sanitize || failed=1
  return $failed
}

# Every tensor is an allocation of its own, so that memory behind it belongs to no other tensor.
sanitize() {
  local tool status failed=0
  if [ $device = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "sanitize: skipped, since compute-sanitizer or a GPU is missing"
    return
  fi
  : >"$out/sanitizer.txt"
  for tool in memcheck racecheck synccheck; do
    echo "== $tool" >>"$out/sanitizer.txt"
    status=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 75 compute-sanitizer --tool $tool \
      --kernel-name kns=clipvip --report-api-errors no --error-exitcode 9 \
      "$PYTHON" bench/kernels.py check >>"$out/sanitizer.txt" 2>&1 || status=$?
    case $status in
      0) echo "$tool: no errors" ;;
      9) echo "$tool: FOUND ERRORS, see sanitizer.txt" ;;
      124 | 137) echo "$tool: exceeded its time" ;;
      *) if grep -qi "not supported" "$out/sanitizer.txt"; then
        echo "$tool: skipped, since it does not support this device"
        status=0
      else
        echo "$tool: ended with status $status, see sanitizer.txt"
      fi ;;
    esac
    [ $status = 0 ] || failed=1
  done
  return $failed
}

sweep() {
  needs tyro psutil pytest_benchmark av omegaconf webdataset || return 1
  bench $PART_SECONDS all --only "$sweep_only"
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
    --dry-run) device=cpu quick=(--quick) targets_only=b32-bf16 step_only='' sweep_only='^ops' ;;
    --out | --resume | --wheels | --commit)
      [ $# -ge 2 ] || die "$1 needs a value"
      case $1 in
        --out) out=$(in_callers_folder "$2") ;;
        --resume) earlier=(--resume "$(in_callers_folder "$2")/gpu.jsonl") ;;
        --wheels) install_wheels "$(in_callers_folder "$2")" ;;
        --commit) export CLIPVIP_COMMIT=$2 ;;
      esac
      shift
      ;;
    targets | step | tests | sweep) parts+=("$1") ;;
    -h | --help)
      sed -n '2,/^set /{/^set /!p}' "$self" | sed 's/^# \?//'
      exit
      ;;
    *) die "no part or option '$1'; see bench/gpu.sh --help" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(targets step tests sweep)
[ ${#earlier[@]} -eq 0 ] || [ -e "${earlier[1]}" ] || die "--resume: there is no ${earlier[1]}"
mkdir -p "$out"

failed=
for part in "${parts[@]}"; do
  echo "== $part"
  part_ends=$((SECONDS + PART_SECONDS))
  build
  "$part" || failed+=" $part"
done
[ -z "$failed" ] || {
  echo "bench/gpu.sh: failed:$failed" >&2
  exit 1
}
