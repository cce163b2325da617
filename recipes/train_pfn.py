"""Train the PFN that loadstone ships, on one GPU, in a fixed time: weights, config and the loss curve.

    python recipes/train_pfn.py --seconds 280 --out tiny-pfn

One model learns both tasks, on tables that the priors draw on the GPU as it goes. Steps hold about the same number of
cells, whatever the tables' shape; the learning rate follows the clock, so a run ends when it should.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import pfn_priors as priors
from loadstone.context.pfn import encoding
from loadstone.context.pfn.bars import BarPosterior
from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.model import PFN
from loadstone.context.tables.predictions import CLASSIFICATION, REGRESSION

# Shapes come from short lists, so that what libraries work out for a shape is used again.
FEATURES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 23, 30, 40)
ROWS = (24, 48, 96, 160, 256, 400, 640)
TRAIN_SHARES = (0.12, 0.3, 0.5, 0.7, 0.85)


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention plans every new shape anew, for longer than a step takes, and each batch has its own shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PFNConfig(width=args.width, layers=args.layers, heads=4, hidden=2 * args.width, bars=args.bars)
    model = initialise(PFN(config)).to(device)
    model.borders.copy_(prior_borders(config.bars, device))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    started, step, cells, curve = time.monotonic(), 0, 0, []
    recent: dict[str, list[torch.Tensor]] = {REGRESSION: [], CLASSIFICATION: []}
    while (progress := (time.monotonic() - started) / args.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(progress)
        task = REGRESSION if step % 2 else CLASSIFICATION
        batch, train_rows = draw(task, args.cells, config, device)
        loss = loss_of(model, batch, train_rows, task)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The fused step skips a gradient that is not finite by itself, without waiting for the GPU.
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        step, cells = step + 1, cells + batch.x.numel()
        recent[task].append(loss.detach())
        if step % args.every == 0:
            means = {name: torch.stack(values).mean().item() for name, values in recent.items()}
            curve.append(
                {"step": step, "seconds": round(time.monotonic() - started, 1), "cells": cells} | means
            )
            print(json.dumps(curve[-1]), flush=True)
            recent = {name: [] for name in recent}
    save(model, args.out, curve)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny-pfn"))
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--cells", type=int, default=160_000, help="tokens of a step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bars", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between lines of the loss curve")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def initialise(model: PFN) -> PFN:
    """Residual branches start at nothing, so depth costs no stability."""
    for layer in model.layers:
        for linear in (layer.features_out, layer.rows_out, layer.down):
            torch.nn.init.zeros_(linear.weight)
    return model


def schedule(progress: float) -> float:
    """Linear warm-up over 2 % of the time, then a cosine to zero."""
    return min(progress / 0.02, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


def draw(task: str, cells: int, config: PFNConfig, device: torch.device) -> tuple[priors.Batch, int]:
    """A batch of tables and how many of their rows are training rows."""
    features = min(config.max_features, random.choice(FEATURES))
    rows = random.choice(ROWS)
    tables = max(1, min(1024, cells // (rows * (features + 1))))
    train_rows = int(rows * random.choice(TRAIN_SHARES))
    if task == REGRESSION:
        return priors.regression(tables, rows, features, device), train_rows
    classes = min(config.classes, 2 + int(torch.distributions.Geometric(0.35).sample().item()))
    return priors.classification(tables, rows, features, classes, device), train_rows


def loss_of(model: PFN, batch: priors.Batch, train_rows: int, task: str) -> torch.Tensor:
    """Mean negative log likelihood of the test rows, in nats; regression in units of the training targets."""
    x_train, x_test = batch.x[:, :train_rows], batch.x[:, train_rows:]
    y_train, y_test = batch.y[:, :train_rows], batch.y[:, train_rows:]
    # Fresh codes for every table: the model must not learn which column is which.
    codes = torch.randn(len(batch.x), batch.x.shape[-1], model.config.code_size, device=batch.x.device)
    with torch.autocast(batch.x.device.type, torch.bfloat16):
        logits = model(x_train, y_train, x_test, task, codes).float()
    if task == CLASSIFICATION:
        return torch.nn.functional.cross_entropy(logits[..., : batch.classes].flatten(0, 1), y_test.flatten())
    scaler = encoding.fit_scaler(y_train.unsqueeze(-1))
    z = ((y_test.unsqueeze(-1) - scaler.mean) / scaler.std).squeeze(-1)
    # A handful of tables whose training targets hardly differ would drown all others.
    return -BarPosterior(logits, model.borders.double()).log_prob(z.clamp(-20, 20)).mean().float()


def prior_borders(bars: int, device: torch.device) -> torch.Tensor:
    """Quantiles of the scaled test targets under the prior: every bar is used equally often."""
    found = []
    for _ in range(40):
        batch = priors.regression(64, 64, 1 + int(uniform(0, 8)), device)
        scaler = encoding.fit_scaler(batch.y[:, :24].unsqueeze(-1))
        found.append(((batch.y[:, 24:].unsqueeze(-1) - scaler.mean) / scaler.std).flatten())
    levels = torch.linspace(0.0005, 0.9995, bars + 1, dtype=torch.float64, device=device)
    borders = torch.quantile(torch.cat(found), levels)
    # Ties (constant targets) would make empty bars.
    return (borders + 1e-4 * torch.arange(bars + 1, device=device)).float()


def uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def save(model: PFN, out: Path, curve: list[dict[str, float]]) -> None:
    """The directory that `loadstone.load` reads, and how the losses went."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(curve, indent=0) + "\n")


if __name__ == "__main__":
    main()
