#!/usr/bin/env bash
# Build on a machine with one CUDA GPU, run the GPU tests and the GPU benchmarks, leave rows in bench/results/.
# One command, inside ten minutes: bash bench/gpu.sh [folder for the results]. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-bench/results}
mkdir -p "$out"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'

failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! M3_CUDA=1 timeout 110 "$python" -m pip install --quiet --no-build-isolation --no-deps -e .; then
  echo "gpu.sh: the extensions were not built (needs setuptools>=77, pybind11>=3 and ninja); going on with Triton alone"
  failed=1
fi
"$python" -m m3kernels || failed=1

timeout 170 "$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu_tests.txt" || failed=1

# T = 8192, then 16384, by D = 4096 and V = 151936, against other projects where they are installed (extra "bench").
timeout 150 "$python" -m bench policy_loss --device cuda --out "$out/policy_loss_cuda.jsonl" 2>&1 \
  | tee "$out/gpu_policy_loss.txt" || failed=1

shapes=${SHAPES:-4096x4096,4096x12288,qwen3-8b.down,qwen3-235b-a22b.expert_w13,qwen3-235b-a22b.moe_ep8}
timeout 150 "$python" -m bench int4 --device cuda --shapes "$shapes" --seconds "${SECONDS_PER_CASE:-1}" \
  --out "$out/int4_cuda.jsonl" 2>&1 | tee "$out/gpu_bench.txt" || failed=1
exit "$failed"
