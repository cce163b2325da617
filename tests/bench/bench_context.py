"""One L-BFGS evaluation of a multi-start optimisation: expected improvement of R restarts with its gradient.

Four ways to compute the same numbers, on a PFN of 6 layers, width 128 and one token per feature, with 50 training
rows. ``plain``: every restart carries the training set. ``folded``: restarts in the row axis of one sequence, no cache.
``copied``: cached keys and values, repeated for each restart. ``cached``: cached and folded, as `TrainingContext` does.
On a GPU also ``captured``: that as one CUDA graph, as `optimize_acquisition` and `BarAcquisition` do.

    python -m tests.bench.bench_context [--device cuda] [--restarts 4 8 32] [--features 6 100] [--limit-gb 6]

On a CPU each figure comes from a process of its own, on one thread: CPU seconds (best of three) and the growth of the
resident set in a first evaluation, with the cache itself added. A plain run over ``--limit-gb`` is not made; its
figure is extrapolated from the largest one made, linearly in R, and marked ``~``. On a GPU: medians of ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_WAYS = ("plain", "folded", "copied", "cached")
ROWS = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--restarts", type=int, nargs="+", default=[4, 8, 16, 32, 128, 512])
    parser.add_argument("--features", type=int, nargs="+", default=[6, 100])
    parser.add_argument("--limit-gb", type=float, default=6.0)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "D", "R"))
    parser.add_argument("--json")
    args, _ = parser.parse_known_args()
    if args.one:
        way, d, restarts = args.one
        print(json.dumps(measure(way, int(d), int(restarts), args.device)))
        return
    table = []
    ways = CPU_WAYS if args.device == "cpu" else (*CPU_WAYS, "captured")
    for d in args.features:
        print(
            f"\nd = {d}, {args.device}: seconds / MB; floor by FLOPs: plain needs {flop_ratio(d):.0f} times the cached"
        )
        print(
            f"{'R':>5}" + "".join(f"{way:>20}" for way in ways) + f"{'times faster':>14}{'memory saved':>14}"
        )
        base: dict[str, float] = {}
        for restarts in args.restarts:
            row: dict[str, Any] = {"d": d, "restarts": restarts, "device": args.device}
            for way in ways:
                row[way] = cell(way, d, restarts, args, base if way == "plain" else {})
            table.append(row)
            print(line(row, ways), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))


def cell(way: str, d: int, restarts: int, args: argparse.Namespace, base: dict[str, float]) -> dict[str, Any]:
    """A measured or (plain only) extrapolated figure; ``base`` remembers the largest plain one made."""
    if base and base["megabytes"] / base["restarts"] * restarts > args.limit_gb * 1000:
        factor = restarts / base["restarts"]
        return {
            "seconds": base["seconds"] * factor,
            "megabytes": base["megabytes"] * factor,
            "extrapolated": True,
        }
    if args.device == "cpu":
        command = [sys.executable, "-m", "tests.bench.bench_context", "--one", way, str(d), str(restarts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    else:
        found = measure(way, d, restarts, args.device)
    if way == "plain":
        base.update(found, restarts=restarts)
    return found


def line(row: dict[str, Any], ways: tuple[str, ...]) -> str:
    plain, cached = row["plain"], row[ways[-1]]
    cells = ""
    for way in ways:
        mark = "~" if row[way].get("extrapolated") else ""
        cells += (
            f"{mark + format(row[way]['seconds'], '.4f') + ' / ' + format(row[way]['megabytes'], '.0f'):>20}"
        )
    saved = 100 * (1 - cached["megabytes"] / plain["megabytes"])
    return f"{row['restarts']:>5}{cells}{plain['seconds'] / cached['seconds']:>13.0f}x{saved:>12.1f} %"


def setting(d: int, device: str) -> tuple[Any, Any, Any]:
    """(model, training rows, targets)."""
    import torch

    from loadstone.context.pfn.config import PFNConfig
    from loadstone.context.pfn.model import PFN

    torch.manual_seed(0)
    model = PFN(PFNConfig(width=128, hidden=512, layers=6, heads=4, bars=100, classes=0)).requires_grad_(
        False
    )
    x = torch.rand(ROWS, d)
    return model.to(device), x.to(device), torch.sin(3 * x).sum(-1).to(device)


def evaluation(way: str, d: int, restarts: int, device: str) -> tuple[Callable[[], Any], int]:
    """What one step computes, and the bytes of the cache it holds."""
    import torch

    from loadstone.context.bayesopt.acquisition import ei
    from loadstone.context.pfn.bars import BarPosterior
    from loadstone.context.pfn.captured import CapturedGradient

    model, x, y = setting(d, device)
    context = model.fit(x, y)
    borders, best = context.borders, y.max()
    start = torch.rand(restarts, 1, d, generator=torch.Generator().manual_seed(1)).to(device)

    def logits(queries: torch.Tensor) -> torch.Tensor:
        if way == "plain":
            return model(
                x.expand(restarts, -1, -1), y.expand(restarts, -1), queries, "regression", context.codes
            )
        if way == "folded":
            rows = queries.reshape(1, restarts, d)
            return model(x.unsqueeze(0), y.unsqueeze(0), rows, "regression", context.codes)
        if way == "cached":
            return context.logits(queries)
        tokens = model.embed_rows(
            context.scaler(queries), context.codes, model.unknown_target.expand(restarts, 1, -1)
        )
        for layer, cache in zip(model.layers, context.layers, strict=True):
            tokens = layer.mix_features(tokens, target_only=layer is model.layers[-1])
            copies = (kept.repeat(restarts, 1, 1, 1) for kept in (cache.keys, cache.values))
            tokens = layer.attend(tokens, *copies)
        return model.read_out(tokens[:, :, -1], "regression")

    if way == "captured":
        step = CapturedGradient(lambda rows: ei(context.posterior(rows), best))
        step(start[:, 0])
        return (lambda: step(start[:, 0])[1]), context.nbytes

    def plain_step() -> torch.Tensor:
        queries = start.clone().requires_grad_()
        ei(BarPosterior(logits(queries), borders), best).sum().backward()
        assert queries.grad is not None
        return queries.grad

    return plain_step, context.nbytes if way in ("copied", "cached") else 0


def measure(way: str, d: int, restarts: int, device: str) -> dict[str, float]:
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    step, held = evaluation(way, d, restarts, device)
    grown = _growth(step, torch.device(device))
    seconds = []
    for _ in range(3 if device == "cpu" else 10):
        if device == "cpu":
            begin = time.process_time()
            step()
            seconds.append(time.process_time() - begin)
            if sum(seconds) > 20:
                break
            continue
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    chosen = min(seconds) if device == "cpu" else statistics.median(seconds)
    return {"seconds": chosen, "megabytes": (grown + held) / 1e6}


def _growth(step: Callable[[], Any], device: Any) -> int:
    """Bytes that a first evaluation needs beyond what is held before it."""
    import torch

    from loadstone.evaluation.measure import peak_bytes, reset_peak

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        reset_peak(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    import ctypes

    # What the prefill freed must go back to the system, or the step would use it unseen. The first, smallest
    # evaluation pays for one-time buffers of the libraries.
    evaluation("cached", 2, 1, "cpu")[0]()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak(device)
    before = peak_bytes(device)
    step()
    return peak_bytes(device) - before


def flop_ratio(d: int) -> float:
    """Floating-point operations of a plain evaluation over those of a cached one, counted in the products."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for way in ("plain", "cached"):
        step, _ = evaluation(way, d, 1, "cpu")
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


if __name__ == "__main__":
    main()
