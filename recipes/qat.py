"""Quantization-aware training with transformers' Trainer: load, prepare, train on text, save, record.

    python recipes/qat.py -M tiny-llama --recipe int8-dynamic-act-int4-weight --text stories.txt -o run
    loadstone finalize -M run -o tiny-w4        # converts by the recipe that the checkpoint records

Fake quantization makes every Linear compute with the weights (and activations) that the converted model will have,
while gradients pass straight through to the full-precision ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

import loadstone
from loadstone.loading import load_tokenizer
from loadstone.quantization.qat import prepare, record


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-M", "--model", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--recipe", default="int8-dynamic-act-int4-weight")
    parser.add_argument(
        "--text", type=Path, required=True, help="plain text, cut into rows of --length tokens"
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    # float32 master weights: steps of a small learning rate would round away in bf16. Saved in bf16, below.
    model = loadstone.load(options.model, device="cpu", dtype="float32")
    stored = loadstone.load(options.model, device="cpu").dtype
    tokenizer = load_tokenizer(options.model)
    rows = blocks(tokenizer(options.text.read_text())["input_ids"], options.length)

    prepare(model, options.recipe)
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(options.steps // 20, 50),
        logging_steps=max(options.steps // 20, 1),
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to=[],
        seed=options.seed,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()

    model.config.use_cache = True
    model.to(device="cpu", dtype=stored).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    record(options.out, options.recipe)
    print(f"{options.out}: trained for {options.recipe}; now: loadstone finalize -M {options.out} -o OUT")


def blocks(ids: list[int], length: int) -> list[dict[str, torch.Tensor]]:
    """Rows of ``length`` tokens as the Trainer takes them; the tail that fills no row is left out."""
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


if __name__ == "__main__":
    main()
