#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: the kernels' tests as compiled, their
# benchmarks, and the MR-SP step. Needs torch for CUDA with its Triton, pytest and numpy; not Megatron-core, except for
# the MR-SP step. Results go to $OUT, or to benchmarks/results/<gpu>. Fails when a test fails.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks/kernels${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "gpu_suite.sh needs a CUDA GPU: torch sees none"' || exit 1
name=$("$PYTHON" -c 'import measure; print(measure.device_name())')
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out"
log="$out/gpu_suite.log"
: >"$log"
failed=0

# step NAME SECONDS COMMAND…: its output goes to the log too; a failure is counted and the next step still runs.
step() {
    local title=$1 limit=$2
    shift 2
    echo "== $title" | tee -a "$log"
    timeout "$limit" "$@" 2>&1 | tee -a "$log"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        echo "== $title FAILED with exit code $status (124: over $limit s)" | tee -a "$log"
        failed=1
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader >>"$log"
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$log"
step "kernel tests" 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_interval_attention_triton.py \
    tests/kernels/test_linear_logprob.py
step "attention" 150 "$PYTHON" benchmarks/kernels/attention.py --seconds 0.3 --out "$out"
step "output layer" 60 "$PYTHON" benchmarks/kernels/linear_logprob.py --seconds 0.3 --out "$out"
if [ -f benchmarks/mrsp_step.py ] && "$PYTHON" -c 'import megatron.core' 2>/dev/null; then
    step "MR-SP step" 120 "$PYTHON" benchmarks/mrsp_step.py --out "$out"
else
    echo "== MR-SP step left out: it needs benchmarks/mrsp_step.py and Megatron-core" | tee -a "$log"
fi
exit "$failed"
