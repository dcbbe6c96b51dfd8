#!/usr/bin/env bash
# Measures on a machine with a GPU, from the source tree: no network, nothing is installed, downloaded or decoded.
#
#   bench/gpu.sh [--minutes N] [OUT [STAGE...]]
#
# OUT      the folder for the results, seen from the repository's root; default $OUT, else bench/results/<device>
# STAGE    truth (the kernels' tests on this GPU), kernels, step, memory, encode; default: all of them in this order
# N        minutes after which a stage begins nothing more; default 8, which leaves it below 9
#
# Call it again until nothing is left: what was finished stays, and every stage goes on where it was cut off. Results
# are written after each case. Ends with the first error of any stage, after all of them.
# Needs a Python with the packages of pyproject.toml; name another one with PYTHON=...
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
MINUTES=8
if [ "${1:-}" = "--minutes" ]; then
    MINUTES=${2:?"--minutes wants a number"}
    shift 2
fi
OUT=${1:-${OUT:-}}
[ $# -gt 0 ] && shift
PYTHON=${PYTHON:-python3}
SUITES=(kernels step memory encode)
STAGES=("$@")
if [ ${#STAGES[@]} -eq 0 ]; then
    STAGES=(truth)
    for suite in "${SUITES[@]}"; do
        [ -f "bench/$suite.toml" ] && STAGES+=("$suite")
    done
fi
for stage in "${STAGES[@]}"; do
    if [ "$stage" != truth ] && [ ! -f "bench/$stage.toml" ]; then
        echo "bench/gpu.sh: there is no suite bench/$stage.toml" >&2
        exit 2
    fi
done
if ! (cd / && "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ltxforge") is None)'); then
    export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1
if [ -z "$OUT" ]; then
    OUT=bench/results/$("$PYTHON" -c 'from ltxforge.benchmark import device_name; print(device_name())') || exit 2
fi
mkdir -p "$OUT" || exit 2

# The kernels' tests, compiled and run: what the interpreter proves everywhere, proved on this chip. Kept once passed.
truth() {
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "truth       no GPU: the kernels' tests run in Triton's interpreter instead, by make test"
        return 0
    fi
    local sources
    sources=$(find kernels tests/kernels -name '*.py' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    if [ -f "$OUT/truth.passed" ] && [ "$(cat "$OUT/truth.passed")" = "$sources" ]; then
        echo "truth       passed before with these sources"
        return 0
    fi
    TRITON_INTERPRET=0 timeout "$LIMIT" "$PYTHON" -m pytest tests/kernels -q -m "not sweep" -p no:cacheprovider \
        2>&1 | tee "$OUT/truth.txt" || return 1
    echo "$sources" > "$OUT/truth.passed"
}

LIMIT=$("$PYTHON" -c "print(int(60 * $MINUTES) + 50)") || exit 2
status=0
for stage in "${STAGES[@]}"; do
    if [ "$stage" = truth ]; then
        truth
    else
        timeout "$LIMIT" "$PYTHON" -m ltxforge bench "$stage" --out "$OUT" --resume --minutes "$MINUTES" --plain
    fi
    code=$?
    [ "$code" -ne 0 ] && [ "$status" -eq 0 ] && status=$code
done
exit "$status"
