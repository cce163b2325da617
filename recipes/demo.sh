#!/bin/sh
# The main job on the model inside the package: quantize, measure against the original, look inside. Needs no download.
# Usage: sh recipes/demo.sh [MODEL]   (`make demo` sets up what it needs, then runs this)
set -eu
model=${1:-builtin:tiny-llama}
out=.cache/demo/$(basename "$model" | tr ':' '-')-w4
mkdir -p "$(dirname "$out")"

echo "== finalize"
loadstone finalize -M "$model" --quantize int8-dynamic-act-int4-weight -o "$out" --overwrite
echo "== eval"
loadstone eval -M "$model" -M "$out" --limit "${DEMO_LIMIT:-120}"
echo "== inspect"
loadstone inspect "$out"
