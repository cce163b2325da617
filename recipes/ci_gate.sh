#!/bin/sh
# A CI gate: fail the job when a quantized model lost more than it may, judged at 95 % confidence.
# Usage: BASELINE=run/checkpoint-900 MODEL=tiny-w4 [GATE='dloss>0.03@95'] [DATA=held-out.jsonl] sh recipes/ci_gate.sh
# Exit 0: passed; 4: the gate failed; 3: a model could not be loaded; 2: wrong use. RESULT (result.json) holds the figures.
set -eu
: "${BASELINE:?the directory of the unquantized model}" "${MODEL:?the directory of the quantized model}"
exec loadstone --quiet eval -M "$MODEL" --baseline "$BASELINE" \
    --data "${DATA:-sample}" ${LIMIT:+--limit "$LIMIT"} \
    --fail-if "${GATE:-dloss>0.03@95}" --json "${RESULT:-result.json}" \
    ${CACHE:+--cache "$CACHE"}
