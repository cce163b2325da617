"""Pretrain a tiny Llama on stories with transformers' Trainer: a real training run for `loadstone finalize` to read.

    python recipes/pretrain.py --stories stories -o run      # stories: what recipes/stories.py wrote
    loadstone finalize -M run --dtype bfloat16 -o tiny-llama

4.43 million parameters, as the tiny Llama of Forgather's three-way comparison. Rows are cut as `loadstone eval` cuts
them (packed), so the Trainer's evaluation loss is its loss too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from loadstone.text.corpus import read_corpus
from loadstone.text.tokenizing import tokenize

LENGTH = 512


class Rows(Dataset):
    """Rows of ``length + 1`` tokens of a stream [end] story [end] story ..., each beginning where the last one ended.

    A model scores all but a row's first token, so every token is scored once. ``score_ends`` also trains on the
    token between stories: a model that writes must know when to stop; an evaluation scores text alone.
    """

    def __init__(
        self, text: str | Path, tokenizer: Any, length: int = LENGTH, *, score_ends: bool, tokens: int = 0
    ) -> None:
        stream = tokenize(read_corpus(str(text)), tokenizer)
        self.ids = torch.from_numpy(stream.ids)[: tokens or None]
        self.labels = self.ids.clone()
        if not score_ends:
            self.labels[torch.from_numpy(stream.document)[: tokens or None] < 0] = -100
        self.length = length
        # The last row is filled up with what nobody scores.
        missing = -(len(self.ids) - 1) % length
        self.ids = F.pad(self.ids, (0, missing), value=stream.separator_id)
        self.labels = F.pad(self.labels, (0, missing), value=-100)

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        cut = slice(index * self.length, (index + 1) * self.length + 1)
        return {"input_ids": self.ids[cut], "labels": self.labels[cut]}


def tiny_llama(tokenizer: Any) -> LlamaForCausalLM:
    """4.43M parameters: 4 layers, width 256, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            # What it is trained on: beyond it the loss climbs.
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def arguments(out: Path, **more: Any) -> TrainingArguments:
    """What all training here has in common: AdamW, a cosine to zero, bf16 autocast on a GPU."""
    return TrainingArguments(
        output_dir=str(out),
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        weight_decay=0.1,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_available(),
        # It goes into the checkpoints' config, and a model without its cache writes slowly.
        use_cache=True,
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def evaluation_loss(model: PreTrainedModel, rows: Rows, batch: int = 64) -> float:
    """The Trainer's own evaluation loss, nats a token, in the model's dtype."""
    plain = TrainingArguments(
        output_dir="unused", per_device_eval_batch_size=batch, report_to=[], disable_tqdm=True
    )
    return Trainer(model=model, args=plain, eval_dataset=rows).evaluate()["eval_loss"]


def main() -> None:
    options = parse()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.stories / "tokenizer")
    train = Rows(options.stories / "train.txt", tokenizer, score_ends=True)
    held_out = Rows(options.stories / "heldout.txt", tokenizer, score_ends=False, tokens=200_000)
    steps = options.steps or options.epochs * len(train) // options.batch
    print(f"{len(train.ids):,} tokens, {steps} steps of {options.batch} rows")
    trainer = Trainer(
        model=tiny_llama(tokenizer),
        args=arguments(
            options.out,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=64,
            learning_rate=options.lr,
            warmup_steps=max(1, steps // 50),
            logging_steps=max(1, steps // 40),
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_steps=max(1, steps // 4),
            save_total_limit=2,
            seed=options.seed,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    print(json.dumps(trainer.state.log_history[-2:]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=Path, required=True, help="train.txt, heldout.txt and tokenizer/")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch", type=int, default=64, help="rows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
