#!/usr/bin/env bash
# On a machine with a card, no network needed: the kernels' tests, then the benchmarks of a part; the table comes last.
#   benchmarks/gpu.sh first     the first eight minutes on a card: does all of it run, leak and agree, then the most wanted
#                               times (all of python -m benchmarks.first; "first --only smoke,memory,tests" for a part)
#   benchmarks/gpu.sh kernels
#   benchmarks/gpu.sh step      whole T-GRPO steps of the 7B's shapes, from video files to updated weights, ours beside the
#                               algorithm as the reference code computes it
#   benchmarks/gpu.sh training  the training pass of the 3B's and the 7B's shapes, ours beside repeated rows
#   benchmarks/gpu.sh growth    how both grow with frames, length and number of completions, prompts, by the 3B's shapes
#   benchmarks/gpu.sh rollout   rollouts of the 7B's and the 3B's shapes, our engine beside transformers' generate, of 1 and
#                               of 16 prompts; generate takes minutes for these, and the 3B's are left out if time is up
#   benchmarks/gpu.sh video     frames to patches beside the chain in torch; decoding by NVDEC and by the CPU, 360p to 1080p
#                               (needs PyAV: pip install av)
#   benchmarks/gpu.sh tune      sweeps the tile sizes instead: no tests, no other libraries
# The JSON file goes to $OUT (default benchmarks/results). BENCH_COMMIT names the commit where there is no repository,
# TESTS the tests to run (default: those of the Triton backend and of the operators). SECONDS_FOR_TESTS bounds these;
# once SECONDS_FOR_BENCHMARKS have gone by, other libraries' remaining rows are left out (ours and plain torch are
# measured first, and always).
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?"which part: first, kernels, step, training, growth, rollout, video or tune"}
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
# Steps of very different sizes follow each other: without this the memory breaks into pieces that fit none of them.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Kernels compiled elsewhere by the same Triton and Python (python -m benchmarks.compiling --cache DIR 90), or by an
# earlier run, are not compiled again.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.triton}
mkdir -p "$out"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: expected a CUDA device that torch can use, found none" >&2
    exit 2
}
if [ "$part" = first ]; then
    exec "$python" -m benchmarks.first --device cuda --out "$out" "${@:2}"
fi
if [ "$part" = tune ]; then
    exec "$python" -m benchmarks.tune --out "$out"
fi
case "$part" in
step | growth)
    "$python" -c "import av, videor1.training.tgrpo" || {
        echo "gpu.sh: $part runs the trainer, which needs what 'pip install -e .' installs; without a network, carry" \
            "wheels made elsewhere by: pip download -d wheels . (and pip install --no-index -f wheels NAME here)" >&2
        exit 2
    }
    ;;
esac
if [ "$part" = growth ]; then
    exec "$python" -m benchmarks.growth --shape 3b --record "$out" --plot "$out/growth.png" \
        --seconds "${SECONDS_FOR_BENCHMARKS:-360}"
fi
tests="not run"
case "$part" in
kernels) files=${TESTS:-tests/kernels/test_[glops]*.py tests/kernels/test_triton_*.py} ;;
video) files=${TESTS:-tests/kernels/test_native_frames.py} ;;
*) files= ;;
esac
if [ -n "$files" ] && "$python" -c "import pytest" 2>/dev/null; then
    tests=passed
    timeout "${SECONDS_FOR_TESTS:-240}" "$python" -m pytest -x -q --durations=5 $files >"$out/tests.log" 2>&1 ||
        tests=failed
    tail -n 15 "$out/tests.log"
fi
"$python" -m benchmarks.run "$part" --device cuda --record "$out" --tests "$tests" \
    --seconds "${SECONDS_FOR_BENCHMARKS:-240}"
status=$?
[ "$tests" != failed ] || { echo "the kernels' tests failed: $out/tests.log" >&2; status=1; }
exit $status
