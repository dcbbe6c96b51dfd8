#!/usr/bin/env bash
# Measures on a machine with a GPU, from the source tree: no network, nothing is installed or downloaded.
#
#   bench/gpu.sh [OUT] [STAGE]
#
# OUT    the folder for the results, seen from the repository's root; default $OUT, else bench/results/<device>
# STAGE  which suite of bench/: step (the default)
#
# Needs a Python with the packages of pyproject.toml; name another one with PYTHON=... Results are written after each
# case, so that a run that is cut off keeps what it has measured.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-}}
STAGE=${2:-step}
PYTHON=${PYTHON:-python3}
if [ ! -f "bench/$STAGE.toml" ]; then
    echo "bench/gpu.sh: there is no suite bench/$STAGE.toml" >&2
    exit 2
fi
if ! (cd / && "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ltxforge") is None)'); then
    export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m ltxforge bench "bench/$STAGE.toml" ${OUT:+--out "$OUT/$STAGE.json"} --plain
