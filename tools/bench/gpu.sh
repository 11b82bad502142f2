#!/bin/sh
# Measure clipdist on one GPU, without a network, in MINUTES: sh tools/bench/gpu.sh 12 --out DIR   (--help says more)
# --rehearse goes through all of it on a CPU. PYTHON names another interpreter.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
