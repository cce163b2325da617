"""Saving and loading a fitted TabPFN estimator: loadstone's context beside the package's own file, in one run.

    python -m tests.bench.bench_tabpfn [--rows 2000] [--columns 20] [--members 8] [--runs 5] [--device cuda]

The checkpoint has random weights of the newest architecture. Each figure comes from a process of its own: the two sides
take turns, seconds are medians of ``--runs``, memory is the growth of the peak resident set over what was there before,
or on a GPU of what is allocated there. The first prediction after a load is timed apart: caches may lie on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("tabpfn", "loadstone")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--task", default="classification")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "STEP", "DIR"))
    args, _ = parser.parse_known_args()
    if args.one:
        side, step, folder = args.one
        print(json.dumps(measure(side, step, Path(folder), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(args.runs):
            for step in ("save", "load"):
                for side in SIDES:
                    found.setdefault((side, step), []).append(run(side, step, folder, args))
        show(found, args)


def make(folder: Path, args: argparse.Namespace) -> None:
    """The checkpoint and the data, made once; the estimator is fitted in each process that saves."""
    import numpy as np
    from tests.context.tabpfn.checkpoints import write_checkpoint

    write_checkpoint(
        folder / "base.safetensors", "tabpfn_v3_5", args.task, embed_dim=args.width, nlayers=args.layers,
        dist_embed_num_blocks=3, dist_embed_num_heads=8, dist_embed_num_inducing_points=128, feat_agg_num_blocks=3,
        feat_agg_num_heads=8, feat_agg_num_cls_tokens=4, icl_num_heads=8, decoder_head_dim=64, decoder_num_heads=6,
        num_buckets=1000,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    x = draw.normal(size=(args.rows, args.columns))
    y = x[:, 0] + 0.1 * draw.normal(size=args.rows)
    y = y if args.task == "regression" else np.digitize(y, [-0.5, 0.5])
    np.savez(folder / "data.npz", x=x, y=y)


def run(side: str, step: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    options = [
        f"--{name}={getattr(args, name)}"
        for name in ("rows", "columns", "members", "width", "layers", "task", "device")
    ]
    command = [sys.executable, "-m", "tests.bench.bench_tabpfn", "--one", side, step, folder, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(side: str, step: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import shutil
    import warnings

    import numpy as np
    import torch
    from tabpfn import TabPFNClassifier, TabPFNRegressor
    from tabpfn.model_loading import load_fitted_tabpfn_model, save_fitted_tabpfn_model

    from loadstone.context.tabpfn import estimator as contexts
    from loadstone.evaluation.measure import peak_bytes, reset_peak

    warnings.simplefilter("ignore")
    theirs, ours = folder / "fitted.tabpfn_fit", folder / "fitted"
    device = torch.device(args.device)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    if device.type == "cuda":
        # The first product on a GPU pays for its libraries.
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    if step == "load":
        reset_peak(device)
        before, begin = peak_bytes(device), clock()
        if side == "tabpfn":
            loaded = load_fitted_tabpfn_model(theirs, device=args.device)
        else:
            loaded = contexts.load(ours, device=args.device)
        seconds, peak = clock() - begin, peak_bytes(device) - before
        begin = clock()
        loaded.predict(np.load(folder / "data.npz")["x"][:2])
        return {"seconds": seconds, "peak": peak, "first": clock() - begin}
    data = np.load(folder / "data.npz")
    kind = TabPFNClassifier if args.task == "classification" else TabPFNRegressor
    estimator = kind(
        model_path=str(folder / "base.safetensors"), fit_mode="fit_with_cache", n_estimators=args.members,
        device=args.device, random_state=0, ignore_pretraining_limits=True,
    ).fit(data["x"], data["y"])  # fmt: skip
    shutil.rmtree(ours, ignore_errors=True)
    reset_peak(device)
    before, begin = peak_bytes(device), clock()
    if side == "tabpfn":
        save_fitted_tabpfn_model(estimator, theirs)
        size = theirs.stat().st_size
    else:
        contexts.save(estimator, ours)
        size = sum(p.stat().st_size for p in ours.iterdir())
    seconds, peak = clock() - begin, peak_bytes(device) - before
    if side == "tabpfn":
        contexts.save(estimator, ours, overwrite=True)
    cache = sum(t.nbytes for t in contexts.cache_tensors(estimator))
    return {
        "seconds": seconds, "peak": peak, "size": size, "cache": cache,
        "base": (folder / "base.safetensors").stat().st_size,
    }  # fmt: skip


def show(found: dict[tuple[str, str], list[dict[str, Any]]], args: argparse.Namespace) -> None:
    middle = lambda side, step, key: statistics.median(row[key] for row in found[side, step])  # noqa: E731
    one = found["loadstone", "save"][0]
    print(
        f"\n{args.device}: {args.task}, {args.rows} rows, {args.columns} columns, {args.members} members; "
        f"keys and values {one['cache'] / 1e6:.1f} MB, base checkpoint {one['base'] / 1e6:.1f} MB"
    )
    print(
        f"{'':<12}{'save, s':>10}{'MB over':>10}{'load, s':>10}{'MB over':>10}{'predict, s':>12}{'file, MB':>11}"
    )
    for side in SIDES:
        cells = [(step, key) for step in ("save", "load") for key in ("seconds", "peak")]
        values = [middle(side, *cell) for cell in cells]
        line = "".join(
            f"{v:>10.3f}" if key == "seconds" else f"{v / 1e6:>10.1f}"
            for (_, key), v in zip(cells, values, strict=True)
        )
        first = middle(side, "load", "first")
        print(f"{side:<12}{line}{first:>12.3f}{middle(side, 'save', 'size') / 1e6:>11.2f}")
    ratios = {
        step: middle("tabpfn", step, "seconds") / middle("loadstone", step, "seconds")
        for step in ("save", "load")
    }
    print(f"loadstone is {ratios['save']:.2f}x as fast to save and {ratios['load']:.2f}x as fast to load")


if __name__ == "__main__":
    main()
