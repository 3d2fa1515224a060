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
# Several files at a time: most of a test's time is the compiler's.
step "kernel tests" 190 bash -c 'printf "%s\n" tests/kernels/test_*.py | xargs -P 5 -n 1 "$0" -m pytest -q -p no:cacheprovider' \
    "$PYTHON"
step "attention" 100 "$PYTHON" benchmarks/kernels/attention.py --seconds 0.3 --out "$out"
step "output layer" 40 "$PYTHON" benchmarks/kernels/linear_logprob.py --seconds 0.3 --out "$out"
step "decoding on shared prompts" 35 "$PYTHON" benchmarks/kernels/shared_prefix_decode.py --seconds 0.2 --out "$out"
step "rotary, SwiGLU" 35 "$PYTHON" benchmarks/kernels/elementwise.py --seconds 0.2 --out "$out"

if ! "$PYTHON" -c 'import megatron.core' 2>/dev/null && [ -d wheels ]; then
    timeout 20 "$PYTHON" -m pip install --quiet --no-index --find-links wheels megatron-core 2>&1 | tee -a "$log"
fi
if missing=$("$PYTHON" -c 'import megatron.core, benchmarks.mrsp_step' 2>&1); then
    # On one GPU the variants that share a sequence over ranks are those that do not. Each length is a call of its own,
    # so that a time limit cannot take the results of both.
    for frames in 16 64; do
        step "MR-SP step, $frames frames" 75 "$PYTHON" -m benchmarks.mrsp_step --model qwen2-0.5b --frames "$frames" \
            --rounds 1 --response 32 --variant plain --variant stage_1 --variant megavila \
            --out "$out/mrsp_step_qwen2-0.5b_$frames.json"
    done
else
    echo "== MR-SP step left out, it cannot be imported: $(tail -n 1 <<<"$missing")" | tee -a "$log"
fi
exit "$failed"
