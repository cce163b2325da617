"""The three-way comparison: a bf16 model, quantized after training, and trained for quantization.

    python recipes/three_way.py --train stories/train.txt --heldout stories/heldout.txt -o three-way

`loadstone.finalize` rounds plainly, with data-free scales and with calibration; recipes/qat.py trains under fake
quantization from the language model's loss and by self-distillation, with a control that trains as long without it; one
`loadstone.evaluate` compares all of them with paired intervals. Writes table.md, table.json and the artifacts. A
finished step is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import loadstone
from loadstone.errors import UsageError
from loadstone.loading import load_tokenizer
from loadstone.quantization.qat import prepare
from pretrain import LENGTH, Rows, evaluation_loss

RECIPE = "int8-dynamic-act-int4-weight"
HERE = Path(__file__).parent


def main() -> None:
    options = parse()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    base = str(options.base)
    tokenizer = load_tokenizer(base)
    training = ["--text", options.train, "--steps", str(options.steps), "--batch", str(options.batch)]

    print("== finalize after training")
    calibration = {"calibrate": options.train, "calibrate_tokens": options.calibrate}
    rounding: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("PTQ, plain rounding", "ptq", {}),
        ("PTQ, MSE-optimal scales (no data)", "mse", {"algorithm": "mse"}),
        ("PTQ, GPTQ (calibrated)", "gptq", calibration),
    )
    rows: dict[str, Path] = {}
    for label, name, how in rounding:
        rows[label] = out / name
        finalize(base, rows[label], recipe=RECIPE, **how)

    print("== train under fake quantization")
    runs = {
        "QAT, language-model loss": ("qat", [], options.lr),
        "QAT, self-distillation": ("distill", ["--distill"], options.distill_lr),
        "control: bf16 trained as long": ("control", ["--control"], options.lr),
    }
    for label, (name, flags, lr) in runs.items():
        checkpoint = out / f"{name}-checkpoint"
        if not (checkpoint / "config.json").exists():
            script("qat.py", "-M", base, "-o", checkpoint, "--lr", str(lr), *training, *flags)
        rows[label] = out / name
        finalize(checkpoint, rows[label])

    print("== checks")
    checks = {
        name: agreement(out / f"{name}-checkpoint", out / name, tokenizer) for name in ("qat", "distill")
    }
    refused = error_of_another_recipe(out / "qat-checkpoint", out / "no")
    heldout = Rows(options.heldout, tokenizer, LENGTH, score_ends=False)
    model = loadstone.load(base, device=device(), dtype="float32")
    trainer_loss = evaluation_loss(model, heldout)
    del model

    print("== evaluate")
    whole = evaluate(base, list(rows.values()), options.heldout, out)
    against_ptq = evaluate(rows["PTQ, plain rounding"], list(rows.values()), options.heldout, out)
    same = Rows(options.heldout, tokenizer, LENGTH, score_ends=False)
    scored = int((same.labels[1 : len(same) * LENGTH + 1] != -100).sum())
    result = {
        "recipe": RECIPE,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, loadstone)},
        "training": {
            "steps": options.steps,
            "rows": options.batch,
            "tokens_a_row": LENGTH,
            "learning_rate": options.lr,
            "distillation_learning_rate": options.distill_lr,
        },
        "trainer_eval_loss": trainer_loss,
        "trainer_tokens": scored,
        "prepared_equals_converted": checks,
        "other_recipe_refused": {"exit": refused.exit_code, "error": str(refused)},
        "rows": records({"bf16": Path(base), **rows}, whole, against_ptq),
    }
    (out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "table.md").write_text(table(result))
    print((out / "table.md").read_text())


def records(rows: dict[str, Path], whole: dict[str, Any], against: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a row: its loss, and its paired differences to bf16 and to plain rounding."""
    by_path = {m["path"]: m for m in whole["models"]}
    to_ptq = {m["path"]: m for m in against["models"]}
    found = []
    for label, path in rows.items():
        mine, other = by_path[str(path)], to_ptq.get(str(path), {})
        found.append(
            {"label": label, "tokens": mine["tokens"], "bits_per_parameter": mine["bits_per_parameter"]}
            | {
                k: mine[k]
                for k in ("loss", "loss_stderr", "perplexity", "delta_loss", "delta_loss_interval95")
            }
            | {f"to_ptq_{k}": other.get(k) for k in ("delta_loss", "delta_loss_interval95")}
        )
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = result["rows"]
    plain = next(r["delta_loss"] for r in rows if r["label"].startswith("PTQ, plain"))
    lines = [
        f"{result['recipe']}, {rows[0]['tokens']:,} held-out tokens, float32, {result['device']}, "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| model | loss | perplexity | Δloss to bf16 [95 %] | Δloss to plain PTQ [95 %] | of the PTQ loss taken off |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = "-" if r["delta_loss"] is None else f"{1 - r['delta_loss'] / plain:.0%}"
        lines.append(
            f"| {r['label']} | {r['loss']:.4f} ± {r['loss_stderr']:.4f} | {r['perplexity']:.3f} "
            f"| {interval(r['delta_loss'], r['delta_loss_interval95'])} "
            f"| {interval(r['to_ptq_delta_loss'], r['to_ptq_delta_loss_interval95'])} | {share} |"
        )
    first = rows[0]["loss"]
    lines += [
        "",
        f"Trainer's own evaluation loss of the bf16 model: {result['trainer_eval_loss']:.6f} on "
        f"{result['trainer_tokens']:,} tokens; loadstone eval: {first:.6f}.",
        f"Prepared and converted logits equal: {result['prepared_equals_converted']}.",
        f"The QAT checkpoint asked for as int8-weight-only: exit {result['other_recipe_refused']['exit']}.",
    ]
    return "\n".join(lines) + "\n"


def interval(value: float | None, bounds: list[float] | None) -> str:
    return "-" if value is None or bounds is None else f"{value:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"


def agreement(checkpoint: Path, converted: Path, tokenizer: Any) -> bool:
    """Whether the prepared checkpoint and what finalize made of it give the same logits, bit for bit, in bf16."""
    ids = torch.tensor(
        [tokenizer("Once upon a time, there was a little fox. " * 8)["input_ids"]], device=device()
    )
    trained = prepare(loadstone.load(checkpoint, device=device(), dtype="bfloat16"), RECIPE).eval()
    artifact = loadstone.load(converted, device=device())
    with torch.inference_mode():
        return bool(torch.equal(trained(ids).logits, artifact(ids).logits))


def evaluate(baseline: str | Path, models: list[Path], data: str, out: Path) -> dict[str, Any]:
    """The JSON result of all models against ``baseline``, float32, in the Trainer's windows."""
    others = [model for model in models if model != baseline]
    result = loadstone.evaluate(
        others, baseline=baseline, data=data, dtype="float32", context_length=LENGTH, cache=out / ".cache"
    ).as_json()
    file = out / f"eval-{Path(baseline).name.replace(':', '-')}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def finalize(source: str | Path, target: Path, **options: Any) -> None:
    if not target.exists():
        begin = time.monotonic()
        loadstone.finalize(source, target, **options)
        print(f"{target}: {time.monotonic() - begin:.0f} s", flush=True)


def error_of_another_recipe(checkpoint: Path, target: Path) -> UsageError:
    """The error when a QAT checkpoint is finalized by a recipe that it was not trained for."""
    try:
        loadstone.finalize(checkpoint, target, recipe="int8-weight-only")
    except UsageError as error:
        return error
    raise SystemExit(f"{checkpoint} was finalized by a recipe that it was not trained for")


def script(name: str, *arguments: str | Path) -> None:
    run(HERE / name, *arguments)


def run(*arguments: str | Path) -> None:
    """A Python process; its failure ends this one."""
    print("$ python", *arguments, flush=True)
    begin = time.monotonic()
    if code := subprocess.run([sys.executable, *map(str, arguments)]).returncode:
        sys.exit(code)
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="builtin:tiny-llama", help="the bf16 model")
    parser.add_argument("--train", required=True, help="text to train and calibrate on")
    parser.add_argument("--heldout", required=True, help="text to evaluate on")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500 if gpu else 60)
    parser.add_argument("--batch", type=int, default=64 if gpu else 8)
    # For the text that is shipped: steps of 2e-4 on 4,782 stories learn them by heart. With all of them 4e-4 is best.
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--distill-lr", type=float, default=2e-5 if gpu else 1e-4)
    parser.add_argument("--calibrate", type=int, default=131072, help="tokens for GPTQ")
    return parser.parse_args()


if __name__ == "__main__":
    main()
