"""Record tests/golden/tiny_llama.json: losses and sha256 of what commands write for builtin:tiny-llama.

Usage: python tests/golden/record.py   (only when a change of the numbers is intended; say why in the commit)
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

MODEL = "builtin:tiny-llama"
FILE = Path(__file__).with_name("tiny_llama.json")
CPU_RECIPES = (
    "int8-dynamic-act-int4-weight", "int8-dynamic-act-intx-weight", "int8-dynamic-act-int8-weight", "int8-weight-only",
    "intx4-weight-only", "intx3-weight-only", "intx2-weight-only", "float8-weight-only", "nvfp4-weight-only",
    "mxfp4-dynamic-act-mxfp4-weight", "mxfp8-dynamic-act-mxfp8-weight",
)  # fmt: skip
# What `finalize` is given beside -M and -o, by the name of the row.
FINALIZED: dict[str, list[str]] = {
    "plain": [],
    "plain float16": ["--dtype", "float16"],
    **{recipe: ["--quantize", recipe] for recipe in CPU_RECIPES},
    "intx4 mse": ["--quantize", "intx4-weight-only", "--algorithm", "mse"],
    "intx4 hqq": ["--quantize", "intx4-weight-only", "--algorithm", "hqq"],
    "intx4 asymmetric": ["--quantize", "intx4-weight-only:mapping=asymmetric,group_size=64"],
    "int4 gptq": ["--quantize", "int8-dynamic-act-int4-weight", "--calibrate", "sample", "--calibrate-tokens", "2048"],
    "int8 smoothquant": [
        "--quantize", "int8-dynamic-act-int8-weight", "--algorithm", "smoothquant", "--calibrate", "sample",
        "--calibrate-tokens", "2048",
    ],
    "mixed": ["--recipe", "recipes/mixed-8-4.yaml"],
    "sharded": ["--quantize", "int8-weight-only", "--max-shard-size", "2MB"],
}  # fmt: skip
EXPORTED: dict[str, list[str]] = {
    name: ["--format", name]
    for name in (
        "fp8",
        "fp8:granularity=row",
        "fp8:granularity=block",
        "int8",
        "int4",
        "nvfp4",
        "mxfp8",
        "mxfp4",
    )
} | {"w4a8": ["--format", "w4a8"], "intx4": ["--format", "intx4-weight-only"]}


def run(*arguments: object) -> None:
    """Run one command in this process; raises `RuntimeError` when its exit code is not 0."""
    from loadstone.cli import main

    try:
        main([str(a) for a in ("-q", *arguments)])
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"exit {stop.code}: loadstone {' '.join(map(str, arguments))}") from None


def machine() -> str:
    """The processor and the version of torch: sums of floats, and with them losses and calibrated roundings, differ
    between these in the last digits."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{processor} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def weights_digest(directory: Path) -> str:
    """sha256 over the names and bytes of the weight files, without the manifest and config."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("model*.safetensors")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def config_block(directory: Path) -> str:
    """sha256 of the quantization_config as sorted JSON; empty when there is none."""
    block = json.loads((directory / "config.json").read_text()).get("quantization_config")
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest() if block else ""


def loss(directory: Path | str, work: Path) -> float:
    """The loss that `eval` reports on 20 documents of the default text."""
    result = work / "result.json"
    run("eval", "-M", directory, "--limit", "20", "--device", "cpu", "--json", result)
    content: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return float(content["models"][0]["loss"])


def record(names: set[str] | None = None) -> dict[str, Any]:
    """The table; ``names``: only these rows."""
    found: dict[str, Any] = {"machine": machine(), "finalized": {}, "exported": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if names is None or "source" in names:
            found["source loss"] = loss(MODEL, work)
        for command, table, key in (
            ("finalize", FINALIZED, "finalized"),
            ("export-fakequant", EXPORTED, "exported"),
        ):
            for name, options in table.items():
                if names is not None and name not in names:
                    continue
                out = work / key / name.replace(":", "-").replace(" ", "-")
                out.parent.mkdir(exist_ok=True)
                run(command, "-M", MODEL, *options, "-o", out)
                row: dict[str, Any] = {"weights": weights_digest(out), "block": config_block(out)}
                if command == "finalize" and name in ("plain", *CPU_RECIPES):
                    row["loss"] = loss(out, work)
                found[key][name] = row
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
