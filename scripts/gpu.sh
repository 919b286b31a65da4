#!/usr/bin/env bash
# make gpu: build, test, time and sanitize the kernels on a CUDA device, within 8 minutes. Every part has a limit of its own; a part
# that fails does not stop the next. Needs torch, triton, pytest and numpy; nvcc and compute-sanitizer are used where present.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
arch=$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("make gpu: no CUDA device is here")
print("%d%d" % torch.cuda.get_device_capability())') || exit 1

deadline=$((SECONDS + 470))
summary=()
failed=0

part() { # name, limit in seconds, command...
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) status result
  shift 2
  if ((left < 5)); then
    summary+=("$name: no time left") failed=1
    return 1
  fi
  printf '\n== %s\n' "$name"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@"
  status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result="out of time" failed=1 ;;
    *) result="failed ($status)" failed=1 ;;
  esac
  summary+=("$name: $result, $((SECONDS - begin)) s")
  return $status
}

serves() { "$python" -c "import sys, flowkern as fk; sys.exit(fk.backends('cuda')['$1'] is not None)"; }

if command -v nvcc >/dev/null; then
  FLOWKERN_BUILD=cuda FLOWKERN_CUDA_ARCHS=$arch part "build" 100 "$python" setup.py --quiet build_ext --inplace ||
    echo "the native CUDA kernels were not built: going on with Triton"
else
  summary+=("build: no nvcc, Triton alone")
fi
"$python" -c "import flowkern as fk; print('backends:', fk.backends('cuda'))"

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 12) # most of the time goes to Triton's compiler
part "tests" 170 "$python" -m pytest -q -p no:cacheprovider -m gpu "${workers[@]}" tests/ops
part "benchmark" 150 "$python" benchmarks/speed.py --device cuda

# Where it is present but cannot attach to the device, it is as good as not here.
if compute-sanitizer --error-exitcode 99 "$python" -c "import torch; torch.ones(1, device='cuda').sum()" >/dev/null 2>&1; then
  # Every tensor an allocation of its own, so that what leaves it shows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for backend in triton native; do
    serves $backend || continue
    for tool in memcheck racecheck initcheck; do
      part "compute-sanitizer $tool, $backend" 45 compute-sanitizer --tool $tool --target-processes all --error-exitcode 99 \
        "$python" scripts/fuzz_kernels.py --device cuda --backend $backend --no-check --calls 12
    done
  done
else
  summary+=("compute-sanitizer: not here")
fi

printf '\n%s\n' "make gpu, $SECONDS s"
printf '  %s\n' "${summary[@]}"
exit $failed
