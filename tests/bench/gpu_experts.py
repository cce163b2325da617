"""A small mixture of experts, trained on the stories and quantized: size and loss, plain rounding beside GPTQ.

python tests/bench/gpu_experts.py [--seconds 180] [--hidden 256] [--folder DIR]

A Qwen3-MoE of 8 experts is trained for so long on the first nine tenths of the text and finalized by each recipe;
losses are measured on the rest, paired, on the same tokens. Runs on a CPU too (``--hidden 64 --seconds 60``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import loadstone
from loadstone.text.corpus import read_corpus

CT = "compressed-tensors"
RECIPES: dict[str, dict[str, Any]] = {
    "int8-weight-only": {"recipe": "int8-weight-only"},
    "float8-weight-only": {"recipe": "float8-weight-only"},
    "W4A16 g32": {"recipe": "intx4-weight-only", "layout": CT},
    "W4A16 g32, gptq": {"recipe": "intx4-weight-only", "layout": CT, "algorithm": "gptq"},
    "W4A16 g32, awq": {"recipe": "intx4-weight-only", "layout": CT, "algorithm": "awq"},
    "NVFP4A16": {"recipe": "nvfp4-weight-only", "layout": CT},
    "experts left: int8-dynamic-act-int4-weight": {"recipe": "int8-dynamic-act-int4-weight"},
}


def train(folder: Path, hidden: int, seconds: float, device: str) -> tuple[Path, Path, Path]:
    """The trained model, and files of the text that it was trained on and of the rest."""
    from tests.small_models import make_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    documents = read_corpus("stories").documents
    cut = len(documents) * 9 // 10
    files = folder / "train.txt", folder / "rest.txt"
    for file, part in zip(files, (documents[:cut], documents[cut:]), strict=True):
        file.write_text("\n\f\n".join(part))
    tokenizer = make_tokenizer(vocabulary=1024)
    ids = torch.tensor([i for text in documents[:cut] for i in (*tokenizer(text)["input_ids"], 0)])
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4, head_dim=32,
        num_attention_heads=hidden // 32, num_key_value_heads=max(hidden // 64, 1), moe_intermediate_size=hidden,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=512, tie_word_embeddings=False,
        output_router_logits=True, router_aux_loss_coef=0.01, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    start, step, loss = time.monotonic(), 0, torch.zeros(())
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(1 - spent / seconds, 0.02)
        at = torch.randint(0, len(ids) - 257, (16,))
        batch = torch.stack([ids[i : i + 256] for i in at]).to(device)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {step} steps, training loss {float(loss):.3f}")
    model.config.output_router_logits = False
    model.eval().to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", *files


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        source, text, rest = train(folder, options.hidden, options.seconds, device)
        made = {}
        for number, (label, asked) in enumerate(RECIPES.items()):
            calibrate = {"calibrate": text} if "algorithm" in asked else {}
            made[label] = loadstone.finalize(
                source, folder / f"out{number}", overwrite=True, **asked, **calibrate
            )
        found = loadstone.evaluate(
            [str(done.out) for done in made.values()], baseline=str(source), data=str(rest)
        )
        print("| weights | MB | parameters quantized | loss | change |\n|---|---|---|---|---|")
        total = sum(info.numel for info in loadstone.detect(source).tensors.values())
        plain, *records = found.records
        print(f"| bfloat16 | {2 * total / 1e6:.1f} | | {plain['loss']:.4f} | |")
        for record, (label, done) in zip(records, made.items(), strict=True):
            share = sum(s.source.numel * len(s.sources) for s in done.plan.steps if s.scheme) / total
            print(
                f"| {label} | {done.plan.bytes_after / 1e6:.1f} | {share:.1%} | {record['loss']:.4f} | "
                f"{record['delta_loss']:+.4f} |"
            )


if __name__ == "__main__":
    main()
