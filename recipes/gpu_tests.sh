#!/bin/sh
# Run the GPU tests (and, with BENCH=1, the GPU benchmarks) on a CUDA machine in one call.
# Needs torch and transformers; what else is missing is installed from WHEELS (a folder of wheels) into SITE.
# MARK=... chooses other tests: `MARK="not gpu and not slow"` runs the default suite with the versions installed there.
# Usage: WHEELS=.wheels OUT=/tmp/out BENCH=1 sh recipes/gpu_tests.sh [pytest arguments]
set -u
out=${OUT:-/tmp/loadstone-gpu}
site=${SITE:-/tmp/loadstone-site}
mkdir -p "$out"
if [ -d "${WHEELS:-.wheels}" ]; then
    python3 -m pip install -q --no-deps --no-index --upgrade --target "$site" "${WHEELS:-.wheels}"/*.whl >"$out/pip.log" 2>&1
fi
export PYTHONPATH="$site:$PWD/src:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -c "
import torch, transformers, torchao
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', 'torch', torch.__version__,
      'transformers', transformers.__version__, 'torchao', torchao.__version__)" 2>/dev/null
python3 -m pytest -m "${MARK:-gpu}" -q -p no:cacheprovider "$@" >"$out/pytest.log" 2>&1
code=$?
grep -E '^(FAILED|ERROR)|passed|failed' "$out/pytest.log" | tail -40
if [ "${BENCH:-0}" = 1 ]; then
    for script in tests/bench/gpu_*.py; do
        [ -e "$script" ] && python3 "$script" 2>"$out/$(basename "$script").log"
    done
fi
exit $code
