"""What the fuzzer changes: one small sound directory or file of every kind that a command reads, made once."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import packed
from tests.small_models import make_model, make_tokenizer, save

from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import MANIFEST
from loadstone.cli import main

STORY = "Once there was a small red fox who lived near the old mill. Every day it ran along the river.\n"
RECIPE = """default: intx4-weight-only
rules:
  - {modules: 're:.*layers.0.*', scheme: skip}
  - {modules: mlp, scheme: int8-weight-only}
lm_head: int8-weight-only
"""
RULES = (
    "format: int8\nrules:\n  - {match: '*.down_proj', format: fp8}\n  - {match: self_attn, format: none}\n"
)
SERVED = "intx4-weight-only:group_size=32"
# Of other quantizers.
OTHERS = {
    "fp8": packed.fp8, "nvfp4": packed.nvfp4, "gptq": packed.gptq, "awq": packed.awq, "auto-round": packed.auto_round,
    "nf4": packed.nf4, "llm-int8": packed.llm_int8,
}  # fmt: skip
SCORING = ("--limit", 2, "--context-length", 32, "--device", "cpu")


def command(*args: object) -> None:
    """One command, which must succeed."""
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{args} ended with {stop.code}") from None


def make(folder: Path) -> None:
    """Write all of them below ``folder``."""
    folder.mkdir(parents=True)
    texts(folder / "text")
    tables(folder)
    models(folder)
    contexts(folder)
    dense, text = folder / "dense", folder / "text" / "a.txt"
    command(
        "eval",
        "-M",
        dense,
        "--data",
        text,
        *SCORING,
        "--cache",
        folder / "cache",
        "--json",
        folder / "base.json",
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "rules.yaml").write_text(RULES)


def models(folder: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = make_model()
    source = save(model, tokenizer, folder / "source")
    command("finalize", "-M", source, "-o", folder / "dense")
    command("finalize", "-M", source, "-o", folder / "sharded", "--max-shard-size", "60KB")
    torchao = ("--quantize", "int8-dynamic-act-int4-weight")
    command("finalize", "-M", source, "-o", folder / "torchao", *torchao)
    command(
        "finalize",
        "-M",
        source,
        "-o",
        folder / "packed",
        "--quantize",
        SERVED,
        "--layout",
        "compressed-tensors",
    )
    command(
        "export-fakequant", "-M", source, "-o", folder / "fakequant", "--format", "mxfp8", "--activations"
    )
    experts = make_model(
        family="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        num_hidden_layers=1,
    )
    command("finalize", "-M", save(experts, tokenizer, folder / "experts-source"), "-o", folder / "experts")
    without = shutil.ignore_patterns("*.safetensors", MANIFEST)
    state = model.state_dict()
    for name in ("bin", "distributed"):
        shutil.copytree(folder / "dense", folder / name, ignore=without)
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    dcp.save({"model": state}, checkpoint_id=folder / "distributed" / "pytorch_model_fsdp_0", no_dist=True)
    for number in (1, 2):
        shutil.copytree(folder / "dense", folder / "run" / f"checkpoint-{number}")
    state_file = {"best_model_checkpoint": "checkpoint-1", "global_step": 2, "log_history": []}
    (folder / "run" / "trainer_state.json").write_text(json.dumps(state_file))
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(folder / "dense"),
    }
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"target_modules": ["q_proj"], "rank_pattern": {"layers.0": 2}})
    )
    chance = torch.Generator().manual_seed(0)
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{place}.lora_A.weight": torch.randn(2, 32, generator=chance),
        f"{place}.lora_B.weight": torch.randn(32, 2, generator=chance),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    others = folder / "others-source"
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        packed.save_model("llama", others / name, dtype)
    for name, write in OTHERS.items():
        write(others / ("bf16" if name in ("fp8", "nvfp4", "nf4") else "f16"), folder / name)
    for name in ("bin", "distributed", "adapter", "fakequant", *OTHERS):
        manifest(folder / name)


def manifest(directory: Path) -> None:
    """What ``--verify`` holds a directory against, where the command that made it wrote none."""
    if not (directory / MANIFEST).exists():
        names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
        files = {name: sha256_file(directory / name) for name in names}
        (directory / MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}))


def texts(folder: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    records = [{"text": STORY * n} for n in (1, 2, 3)]
    plain = "\f\n".join(r["text"] for r in records)
    jsonl = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "a.txt").write_text(plain)
    (folder / "a.jsonl").write_text(jsonl)
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "a.csv").write_text("text\n" + "".join(f'"{r["text"]}"\n' for r in records))
    (folder / "a.txt.gz").write_bytes(gzip.compress(plain.encode()))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(jsonl.encode()))
    (folder / "a.txt.bz2").write_bytes(bz2.compress(plain.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")


def tables(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(12):
        a, b = chance.random(), chance.random()
        rows.append(
            {"a": round(a, 3), "b": round(b, 3), "kind": chance.choice(["x", "y"]), "label": int(a > b)}
        )
    lines = [",".join(map(str, row.values())) for row in rows]
    (folder / "table.csv").write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    (folder / "prompt.json").write_text(json.dumps([{"role": "user", "content": STORY}]))
    (folder / "prompt.txt").write_text(STORY)


def contexts(folder: Path) -> None:
    command("fit", "--table", folder / "table.csv", "--target", "label", "-o", folder / "fitted")
    command(
        "fit",
        "-M",
        folder / "dense",
        "--prompt",
        folder / "prompt.txt",
        "-o",
        folder / "prefix",
        "--device",
        "cpu",
    )
