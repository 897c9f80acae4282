#!/bin/sh
# All that has to be looked at on a GPU, in under five minutes: benchmarks/gpu_check.sh [OUT.json]
# Python is $PYTHON, or that of the virtual environment. What waits for ever is ended.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-runs/bench/gpu.json}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
timeout 100 "$python" -m pytest -q -m gpu test_scripts/gpu/test_gpu_fused.py
timeout 60 "$python" -m benchmarks.kernel_resources --arch 90 --head-dim 128 --mini-batch-size 16
timeout 60 "$python" -m benchmarks operator scaling layer --device cuda --repetitions 3 --out "$out"
timeout 60 "$python" -m benchmarks model --device cuda --dtype bfloat16 --repetitions 3 --out "${out%.json}_model.json"
