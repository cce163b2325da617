"""Quantization-aware training with transformers' Trainer: load, prepare, train on text, save, record.

    python recipes/qat.py -M builtin:tiny-llama --recipe int8-dynamic-act-int4-weight --text stories.txt -o run
    loadstone finalize -M run -o tiny-w4        # converts by the recipe that the checkpoint records

Fake quantization makes every Linear compute with the weights (and activations) that the converted model will have,
while gradients pass straight through to the full-precision ones. The loss is the language model's, or with
``--distill`` the KL divergence from the model that training began with: then the text teaches nothing new, and the
quantized model learns to answer as the original does. ``--control`` trains the same way without fake quantization.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, default_data_collator, set_seed

import loadstone
from loadstone.loading import load_tokenizer
from loadstone.quantization.qat import prepare, record
from pretrain import LENGTH, Rows, arguments


class Distiller(Trainer):
    """A Trainer whose loss is KL(teacher || student), nats a token."""

    def __init__(self, teacher: torch.nn.Module, **rest: Any) -> None:
        super().__init__(**rest)
        self.teacher = teacher.to(self.args.device).eval()
        # The KL divergence below is a mean already.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"]).logits.float().log_softmax(-1)
        outputs = model(input_ids=inputs["input_ids"])
        got = outputs.logits.float().log_softmax(-1)
        loss = F.kl_div(got.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    """Parse, train, save."""
    options = parse()
    set_seed(options.seed)
    # float32 master weights: steps of a small learning rate would round away in bf16. Saved as stored, below.
    model = loadstone.load(options.model, device="cpu", dtype="float32")
    teacher = loadstone.load(options.model, device="cpu", dtype="float32") if options.distill else None
    stored = loadstone.load(options.model, device="cpu").dtype
    tokenizer = load_tokenizer(options.model)
    rows = Rows(options.text, tokenizer, options.length, score_ends=True, tokens=options.tokens)

    if not options.control:
        prepare(model, options.recipe)
    settings = arguments(
        options.out / "trainer",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        warmup_steps=min(options.steps // 20, 50),
        logging_steps=max(options.steps // 10, 1),
        save_strategy="no",
        seed=options.seed,
    )
    common = {"model": model, "args": settings, "train_dataset": rows, "data_collator": default_data_collator}
    (Trainer(**common) if teacher is None else Distiller(teacher, **common)).train()

    model.to(device="cpu", dtype=stored).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    if options.control:
        print(f"{options.out}: trained without fake quantization")
        return
    record(options.out, options.recipe)
    print(f"{options.out}: trained for {options.recipe}; now: loadstone finalize -M {options.out} -o OUT")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-M", "--model", required=True, help="directory, or builtin:tiny-llama")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--recipe", default="int8-dynamic-act-int4-weight")
    parser.add_argument("--text", required=True, help="anything that eval's --data takes")
    parser.add_argument("--tokens", type=int, default=0, help="of the text, 0 for all")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--distill", action="store_true", help="learn from the model itself, not from the text")
    kind.add_argument(
        "--control", action="store_true", help="no fake quantization: what more training alone does"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
