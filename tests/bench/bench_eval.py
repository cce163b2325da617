"""Speed of an evaluation: ours, lm-eval's `hf` model, and a plain transformers loop, on the same text and
model.

python tests/bench/bench_eval.py -M .cache/models/smollm2-135m -M quantized-dir [--documents 6] [--runs 3]

Contenders run in turn within each repetition and the table shows medians over repetitions, so that a slow
minute of a shared machine falls on all of them. lm-eval takes part when it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.conftest import SMOLLM2

from loadstone.evaluation.loaded import open_model
from loadstone.evaluation.models import plan_models
from loadstone.evaluation.options import Options
from loadstone.evaluation.scoring.losses import BatchMaker, plan_batches, score
from loadstone.evaluation.task import Task, make_task


@dataclass(frozen=True)
class Contender:
    name: str
    protocol: str
    run: Callable[[Task], float]  # loss, nats per token


def ours(it: Any, batch_size: int) -> Callable[[Task], float]:
    def run(task: Task) -> float:
        maker = BatchMaker(task.stream, task.protocol, task.windows, it.device)
        values, _ = score(it.model, maker, plan_batches(task.windows, batch_size), name="ours")
        return float(values["nll"].mean(dtype="float64"))

    return run


def plain_loop(model: Any, batch_size: int) -> Callable[[Task], float]:
    """What most scripts do: blocks through the model with labels, losses averaged."""

    def run(task: Task) -> float:
        context = task.protocol.context_length
        ids = torch.from_numpy(task.stream.ids)
        blocks = [ids[at : at + context + 1] for at in range(0, len(ids) - 1, context)]
        total, count = 0.0, 0
        full = [b for b in blocks if len(b) == context + 1]
        groups = [torch.stack(full[i : i + batch_size]) for i in range(0, len(full), batch_size)]
        for group in [*groups, *(b[None] for b in blocks if 1 < len(b) <= context)]:
            with torch.no_grad():
                logits = model(input_ids=group[:, :-1].to(model.device)).logits
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), group[:, 1:].flatten().to(model.device), reduction="sum"
                )
            total, count = total + losses.item(), count + group[:, 1:].numel()
        return total / count

    return run


def lm_eval_hf(model: Any, tokenizer: Any, batch_size: int) -> Callable[[Task], float]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=None)

    def run(task: Task) -> float:
        lm._max_length = task.protocol.context_length
        requests = [
            Instance(
                request_type="loglikelihood_rolling", doc={}, arguments=(d,), idx=0, metadata=("t", i, 1)
            )
            for i, d in enumerate(task.stream.corpus.documents)
        ]
        return -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True)) / task.protocol.tokens

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-M", "--model", action="append", help="default: SmolLM2, where make put it")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument(
        "--bf16-too", action="store_true", help="also the others in bfloat16, lm-eval's default"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        import lm_eval  # noqa: F401

        with_lm_eval = True
    except ImportError:
        with_lm_eval = False
        print("lm-eval is not installed here: its column is left out", file=sys.stderr)
    print(f"{torch.get_num_threads()} threads, batch size {args.batch_size}, context {args.context_length}")
    for path in args.model or [str(SMOLLM2)]:
        bench(path, args, with_lm_eval)


def bench(path: str, args: argparse.Namespace, with_lm_eval: bool) -> None:
    tasks: dict[str, Task] = {}
    for protocol in ("packed", "rolling"):
        options = Options(
            (path,),
            data="austen",
            limit=args.documents,
            protocol=protocol,
            context_length=args.context_length,
        )
        models = plan_models(options, "auto")
        tasks[protocol] = make_task(options, models)
    size = args.batch_size
    contenders = []
    from dataclasses import replace

    with open_model(models[0], options) as fast, open_model(models[0], replace(options, fast=False)) as plain:
        tokenizer = tasks["packed"].tokenizer
        contenders += [
            Contender("ours", "packed", ours(fast, size)),
            Contender("plain loop", "packed", plain_loop(plain.model, size)),
            Contender("ours", "rolling", ours(fast, size)),
        ]
        if with_lm_eval:
            contenders.append(Contender("lm-eval hf", "rolling", lm_eval_hf(plain.model, tokenizer, size)))
        if args.bf16_too:
            narrow = type(plain.model).from_pretrained(path, dtype=torch.bfloat16)
            contenders.append(Contender("plain loop, bf16", "packed", plain_loop(narrow, size)))
            if with_lm_eval:
                contenders.append(
                    Contender("lm-eval hf, bf16", "rolling", lm_eval_hf(narrow, tokenizer, size))
                )
        speeds: dict[Contender, list[float]] = {c: [] for c in contenders}
        losses = {}
        for _ in range(args.runs):
            for contender in contenders:
                task = tasks[contender.protocol]
                begin = time.process_time()
                losses[contender] = contender.run(task)
                speeds[contender].append(task.protocol.tokens / (time.process_time() - begin))
    print(f"\n{path}: {tasks['packed'].protocol.tokens} tokens, {args.runs} runs, {models[0].plan.dtype}")
    print(f"{'':<20}{'protocol':<10}{'loss':>10}{'per CPU-s':>10}{'ours is':>9}")
    for contender in contenders:
        mine = next(c for c in contenders if c.protocol == contender.protocol and c.name == "ours")
        gain = statistics.median(a / b for a, b in zip(speeds[mine], speeds[contender], strict=True))
        print(
            f"{contender.name:<20}{contender.protocol:<10}{losses[contender]:>10.5f}"
            f"{statistics.median(speeds[contender]):>10.0f}{gain:>8.2f}x"
        )


if __name__ == "__main__":
    main()
