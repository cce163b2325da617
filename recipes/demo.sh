#!/bin/sh
# The main job on a real model: quantize, measure against the original, look inside.
# Usage: sh recipes/demo.sh MODEL_DIR   (`make demo` does it all)
set -eu
model=$1
out=.cache/demo/smollm2-w4
mkdir -p "$(dirname "$out")"

echo "== finalize"
loadstone finalize -M "$model" --quantize int8-dynamic-act-int4-weight -o "$out" --overwrite
echo "== eval"
loadstone eval -M "$model" -M "$out" --limit "${DEMO_LIMIT:-12}"
echo "== inspect"
loadstone inspect "$out"
