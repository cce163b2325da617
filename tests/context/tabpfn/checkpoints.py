"""Random-weight TabPFN checkpoints of every architecture version, small enough to fit in seconds.

No package ships weights, and none are needed: what is tested is that nothing is lost, not that it predicts well.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tabpfn_v2": {"emsize": 32, "nlayers": 2, "nhead": 2},
    "tabpfn_v2_5": {"emsize": 32, "nlayers": 2, "nhead": 2, "num_thinking_rows": 4},
    "tabpfn_v2_6": {"emsize": 32, "nlayers": 2, "nhead": 2, "num_thinking_rows": 4},
    "tabpfn_v3": {
        "embed_dim": 32, "dist_embed_num_blocks": 1, "dist_embed_num_heads": 2, "dist_embed_num_inducing_points": 8,
        "feat_agg_num_blocks": 1, "feat_agg_num_heads": 2, "feat_agg_num_cls_tokens": 2, "nlayers": 2,
        "icl_num_heads": 4, "decoder_head_dim": 8, "decoder_num_heads": 2,
    },
    "tabpfn_v3_5": {
        "embed_dim": 32, "dist_embed_num_blocks": 1, "dist_embed_num_heads": 2, "dist_embed_num_inducing_points": 8,
        "feat_agg_num_blocks": 1, "feat_agg_num_heads": 2, "feat_agg_num_cls_tokens": 2, "nlayers": 2,
        "icl_num_heads": 4, "decoder_head_dim": 8, "decoder_num_heads": 2, "fourier_encoding_num_frequencies": 4,
        "cell_ecdf_num_buckets": 64,
    },
}  # fmt: skip


def write_checkpoint(
    path: Path, name: str, task: str, *, seed: int = 0, transforms: list[Any] | None = None, **changes: Any
) -> Path:
    """A checkpoint of architecture ``name`` for ``task`` (classification, regression); ``changes`` to its config."""
    import torch
    from tabpfn.architectures import ARCHITECTURES
    from tabpfn.checkpoint import save_as_safetensors
    from tabpfn.constants import ModelVersion
    from tabpfn.inference_config import InferenceConfig

    newer = name in ("tabpfn_v3", "tabpfn_v3_5")
    heads = {"max_num_classes": 10, "num_buckets": 40}
    if name != "tabpfn_v3_5":
        # Only the newest has a head for either task.
        heads = (
            {"max_num_classes": 10} if task == "classification" else {"max_num_classes": 0, "num_buckets": 40}
        )
    architecture: Any = ARCHITECTURES[name]
    config, _ = architecture.parse_config(SIZES[name] | heads | changes)
    torch.manual_seed(seed)
    model = architecture.get_architecture(config)
    with torch.no_grad():
        # Many layers begin at zero, which would hide differences.
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = dict(model.state_dict())
    if task == "regression" and not newer:
        state |= {
            "criterion.borders": torch.linspace(-4, 4, 41),
            "criterion.losses_per_bucket": torch.zeros(40),
        }
    version = ModelVersion.V2 if name == "tabpfn_v2" else ModelVersion.V2_5
    settings = InferenceConfig.get_default(
        "multiclass" if task == "classification" else "regression", version
    )
    if transforms is not None:
        settings.PREPROCESS_TRANSFORMS = transforms
    save_as_safetensors(
        {
            "state_dict": state,
            "config": asdict(config),
            "architecture_name": name,
            "inference_config": asdict(settings),
        },
        path,
    )
    return path


def estimator(path: Path, task: str, *, fit_mode: str = "fit_with_cache", **options: Any) -> Any:
    """An estimator of the checkpoint, two members by default."""
    from tabpfn import TabPFNClassifier, TabPFNRegressor

    kind = TabPFNClassifier if task == "classification" else TabPFNRegressor
    given = {"n_estimators": 2, "device": "cpu", "random_state": 0} | options
    return kind(model_path=str(path), fit_mode=fit_mode, **given)


def table(task: str, rows: int = 60, *, seed: int = 0) -> tuple[Any, Any, Any]:
    """Training features (numbers with gaps, categories, dates), targets, and rows to predict."""
    import numpy as np
    import pandas as pd

    draw = np.random.default_rng(seed)

    def frame(count: int) -> Any:
        numbers = draw.normal(size=(count, 4))
        numbers[draw.random(numbers.shape) < 0.1] = np.nan
        found = pd.DataFrame(numbers, columns=list("abcd"))
        found["colour"] = draw.choice(["red", "green", "blue"], count)
        found["level"] = draw.integers(0, 3, count)
        return found

    x, new = frame(rows), frame(15)
    score = x["a"].fillna(0) + (x["colour"] == "red") + 0.1 * draw.normal(size=rows)
    if task == "regression":
        return x, score.to_numpy(), new
    return x, np.array(["low", "mid", "high"])[np.digitize(score, [-0.3, 0.6])], new


def fit_command(train: Path, base: Path, task: str) -> list[object]:
    """Write `table` of a task to ``train``; the words of the command that fits ``base`` on it."""
    x, y, _ = table(task)
    x.assign(y=y).to_csv(train, index=False)
    return ["fit", "--table", train, "--target", "y", "-M", base, "--json", "-"]
