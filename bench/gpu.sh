#!/usr/bin/env bash
# Measures on a machine with a GPU, from the source tree: no network, nothing is installed, downloaded or decoded.
#
#   bench/gpu.sh [--minutes N] [--from FOLDER] [OUT [STAGE...]]
#
# OUT      the folder for the results, seen from the repository's root; default $OUT, else bench/results/<device>
# STAGE    truth (the kernels' tests on this GPU), kernels, step, memory, encode; default: all of them in this order
# N        minutes after which a stage begins nothing more; default 8. Each stage takes less than N + 1 minutes
# FOLDER   what an earlier call left; goes on from there where OUT does not hold it already
#
# Call it again until nothing is left: what was finished stays, and every stage goes on where it was cut off. Results
# are written before and after each case. It goes on from what lies in OUT: where OUT is a new folder each time, name
# the last one with --from. What was cut off comes first the next time, and is given up after two tries. Ends with the
# first error of any stage, after all of them.
# Needs a Python with the packages of pyproject.toml; name another one with PYTHON=...
set -uo pipefail

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

refuse() {
    echo "bench/gpu.sh: $1 (bench/gpu.sh --help)" >&2
    exit 2
}

SUITES=(kernels step memory encode)
MINUTES=8
FROM=
while [[ "${1:-}" == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --minutes) MINUTES=${2:-}; shift ;;
        --from) FROM=${2:-}; [ -d "$FROM" ] || refuse "--from wants a folder with earlier results"; shift ;;
        *) refuse "there is no option $1" ;;
    esac
    shift
done
[[ "$MINUTES" =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--minutes wants a number"
[ -n "$FROM" ] && FROM=$(cd "$FROM" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${1:-${OUT:-}}
[ $# -gt 0 ] && shift
case "$OUT" in
    -*) refuse "OUT is a folder, not $OUT" ;;
    truth | kernels | step | memory | encode) refuse "OUT comes before the stages, and $OUT is one: write ./$OUT" ;;
esac
PYTHON=${PYTHON:-python3}
STAGES=("$@")
[ ${#STAGES[@]} -eq 0 ] && STAGES=(truth "${SUITES[@]}")
for stage in "${STAGES[@]}"; do
    [ "$stage" = truth ] || [ -f "bench/$stage.toml" ] || refuse "there is no suite bench/$stage.toml"
done
if ! (cd / && "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ltxforge") is None)'); then
    export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-6}  # the profiler announces itself otherwise
if [ -z "$OUT" ]; then
    OUT=bench/results/$("$PYTHON" -c 'from ltxforge.benchmark import device_name; print(device_name())') || exit 2
fi
mkdir -p "$OUT" || exit 2
if [ -n "$FROM" ]; then
    (cd "$FROM" && find . -name '*.json' -o -path './truth/*') | while IFS= read -r file; do
        if [ -f "$FROM/$file" ] && [ ! -e "$OUT/$file" ]; then
            mkdir -p "$(dirname "$OUT/$file")" && cp -p "$FROM/$file" "$OUT/$file"
        fi
    done
fi

# A stage's seconds: what has begun by then may end, and what does not heed the signal is killed 15 seconds later.
SECONDS_TO_BEGIN=$("$PYTHON" -c "print(int(60 * $MINUTES))") || exit 2
SECONDS_TO_END=$((SECONDS_TO_BEGIN + 40))

# The kernels' tests, compiled and run: what the interpreter proves everywhere, proved on this chip. One file after the
# other, kept once passed; files that no call has come to go before those that were cut off or failed.
truth() {
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "truth       no GPU: the kernels' tests run in Triton's interpreter instead, by make test"
        return 0
    fi
    local began=$SECONDS sources file name code status=0 new=() tried=()
    sources=$(find kernels tests/kernels -name '*.py' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    mkdir -p "$OUT/truth" || return 2
    for file in tests/kernels/test_*.py; do
        name=$(basename "$file" .py)
        if [ "$(cat "$OUT/truth/$name.passed" 2> /dev/null)" = "$sources" ]; then
            echo "truth       $name passed before with these sources"
        elif [ -e "$OUT/truth/$name.txt" ]; then
            tried+=("$file")
        else
            new+=("$file")
        fi
    done
    for file in ${new[@]+"${new[@]}"} ${tried[@]+"${tried[@]}"}; do
        name=$(basename "$file" .py)
        if [ $((SECONDS - began)) -ge "$SECONDS_TO_BEGIN" ]; then
            echo "truth       no time is left for $name and what follows it: call again"
            break
        fi
        TRITON_INTERPRET=0 timeout -k 15 $((SECONDS_TO_END - SECONDS + began)) "$PYTHON" -m pytest "$file" -q \
            -m "not sweep" -p no:cacheprovider 2>&1 | tee "$OUT/truth/$name.txt"
        code=$?
        if [ "$code" -eq 0 ] || [ "$code" -eq 5 ]; then  # 5: nothing but sweeps in this file
            echo "$sources" > "$OUT/truth/$name.passed"
        elif [ "$status" -eq 0 ]; then
            status=$code
        fi
    done
    return "$status"
}

status=0
for stage in "${STAGES[@]}"; do
    if [ "$stage" = truth ]; then
        truth
    else
        timeout -k 15 "$SECONDS_TO_END" \
            "$PYTHON" -m ltxforge bench "$stage" --out "$OUT" --resume --minutes "$MINUTES" --plain
    fi
    code=$?
    [ "$code" -ne 0 ] && [ "$status" -eq 0 ] && status=$code
done
exit "$status"
