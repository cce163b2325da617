#!/bin/sh
# Every fake-quant format on one model, weight-only and with layer inputs, beside torchao's real quantization: exports
# and finalized directories, then one evaluation of all (finished scores are kept in OUT_DIR/.cache).
# Usage: sh recipes/fakequant_table.sh MODEL_DIR OUT_DIR CALIBRATION_TEXT   (LIMIT documents are evaluated)
set -eu
model=$1 out=$2 text=$3
real="int8-weight-only float8-weight-only intx4-weight-only nvfp4-weight-only"
mkdir -p "$out"
set -- -M "$model"
for format in fp8 fp8:granularity=row fp8:granularity=block int8 int4 nvfp4 mxfp8 mxfp4 w4a8 $real; do
    name=$(echo "$format" | tr ':=' '--')
    loadstone -q export-fakequant -M "$model" --format "$format" -o "$out/$name" --overwrite
    set -- "$@" -M "$out/$name"
    case $format in
        *-weight-only | fp8:granularity=block | int4) continue ;;
        mxfp8 | mxfp4 | fp8:granularity=row) inputs=--activations ;;
        *) inputs="--calibrate $text" ;;
    esac
    # shellcheck disable=SC2086
    loadstone -q export-fakequant -M "$model" --format "$format" $inputs -o "$out/$name+inputs" --overwrite
    set -- "$@" -M "$out/$name+inputs"
done
for recipe in $real int8-dynamic-act-int8-weight int8-dynamic-act-int4-weight; do
    loadstone -q finalize -M "$model" --quantize "$recipe" -o "$out/torchao-$recipe" --overwrite
    set -- "$@" -M "$out/torchao-$recipe"
done
loadstone -q eval "$@" --dtype float32 --limit "${LIMIT:-16}" --cache "$out/.cache" --json "$out/table.json"
