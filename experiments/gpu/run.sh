#!/usr/bin/env bash
# What a GPU says, in one command of a few minutes, without a network:
#
#     bash experiments/gpu/run.sh [minutes=9] [data=<CIFAR-10 as an image folder>] [results=<folder>] [small=true]
#
# First the tests marked gpu, then predicted against measured memory, step times, and accuracy runs for the rest of the
# time. Everything is written as it is found. small=true rehearses all of it on a CPU. PYTHON names the interpreter
# (python3): it needs torch, timm, lightning, torchmetrics, hydra-core, omegaconf, pydantic and scikit-learn; with pytest,
# pytest-timeout and hypothesis the tests run, too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
python=${PYTHON:-python3}
started=$SECONDS
export OMP_WAIT_POLICY=PASSIVE  # waiting threads sleep
results=$here/results
for argument in "$@"; do
    case $argument in results=*) results=${argument#results=} ;; esac
done
mkdir -p "$results"

if "$python" -c 'import hypothesis, pytest, pytest_timeout' 2>/dev/null; then
    files=$(grep -rl 'pytest.mark.gpu' tests --include='test_*.py')
    # shellcheck disable=SC2086  # one argument for each file
    "$python" -m pytest -q -m gpu --timeout 120 -p no:cacheprovider $files > "$results/tests.txt" 2>&1 \
        || echo "gpu tests: exit code $?" >> "$results/tests.txt"
    tail -n 1 "$results/tests.txt"
else
    echo "no pytest, pytest-timeout and hypothesis: gpu tests left out" | tee "$results/tests.txt"
fi
exec "$python" experiments/gpu/measure.py "$@" spent=$((SECONDS - started))
