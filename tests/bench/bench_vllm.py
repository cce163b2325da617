"""vLLM on a CPU: seconds a token of each layout beside bfloat16, in the environment of `make test-vllm`.

python -m tests.bench vllm [--runs 3] [--tokens 48] [--model DIR]

Artifacts are finalized here, then each is served in a process of its own by the Python of ``.venv-vllm`` (or VLLM, an
environment variable), sides in turn, medians. One prompt of 64 tokens, greedy decoding, one thread, eager. Time is from
the second to the last token, so that loading and the prompt do not count; CPU time is that of the engine's process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT, SMOLLM2

# Name -> recipe, layout; None: the source itself.
SIDES: dict[str, tuple[str, str] | None] = {
    "bfloat16": None,
    "W4A16 g32": ("intx4-weight-only", "compressed-tensors"),
    "W8A8": ("int8-dynamic-act-int8-weight", "compressed-tensors"),
    "FP8 dynamic": ("float8-dynamic-act-float8-weight", "compressed-tensors"),
    "torchao int8": ("int8-weight-only", "torchao"),
    "torchao intx4": ("intx4-weight-only", "torchao"),
}

CHILD = """
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
import vllm
path, count = sys.argv[1], int(sys.argv[2])
engine = vllm.LLM(
    path, dtype="bfloat16", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, max_num_seqs=1,
    gpu_memory_utilization=0.1,
)
prompt = [{"prompt_token_ids": list(range(100, 164))}]
def seconds(tokens):
    wanted = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
    wall, cpu = time.perf_counter(), time.process_time()
    engine.generate(prompt, wanted, use_tqdm=False)
    return time.perf_counter() - wall, time.process_time() - cpu
seconds(4)
short, long = seconds(1), seconds(1 + count)
print("RESULT " + json.dumps([(b - a) / count for a, b in zip(short, long)]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    options = parser.parse_args()
    python = os.environ.get("VLLM") or str(ROOT / ".venv-vllm" / "bin" / "python")
    if not Path(python).exists():
        sys.exit(f"{python} is missing: make test-vllm makes it")
    import loadstone

    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for number, (name, side) in enumerate(SIDES.items()):
            paths[name] = options.model
            if side is not None:
                paths[name] = Path(folder) / str(number)
                loadstone.finalize(options.model, paths[name], recipe=side[0], layout=side[1])
        times: dict[str, list[list[float]]] = {name: [] for name in SIDES}
        for _ in range(options.runs):
            for name, path in paths.items():
                times[name].append(_served(python, path, options.tokens))
    base = statistics.median(wall for wall, _ in times["bfloat16"])
    print("| layout | ms a token | tokens/s | CPU ms a token | beside bfloat16 |\n|---|---|---|---|---|")
    for name, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        row = (name, f"{wall * 1e3:.1f}", f"{1 / wall:.1f}", f"{cpu * 1e3:.1f}", f"{base / wall:.2f}x")
        print(f"| {' | '.join(row)} |")


def _served(python: str, path: Path, tokens: int) -> list[float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [python, "-c", CHILD, str(path), str(tokens)], capture_output=True, text=True, env=environment
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"vLLM did not serve {path}:\n{done.stderr[-2000:]}")
    found: list[float] = json.loads(line.removeprefix("RESULT "))
    return found


if __name__ == "__main__":
    main()
