"""Fit a TabPFN checkpoint on a table, and predict tables with it; schemas and metrics are those of PFNs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.context.tables import table as tables
from loadstone.context.tables.predictions import (
    CLASSIFICATION,
    QUANTILES,
    TASKS,
    Predictions,
    classified,
    read_queries,
    regressed,
)
from loadstone.context.tabpfn import estimator as tabpfn
from loadstone.errors import ArtifactError, LoadstoneError, UsageError

CHECKPOINTS = (".safetensors", ".ckpt")
# Name on the command line -> tabpfn's kv_cache_precision.
CACHE_PRECISIONS = {None: None, "auto": "auto", "int8": "int8", "fp8": "fp8"}


@dataclass(frozen=True)
class TabpfnPlan:
    """What `fit_table` will do. ``cache_bytes``: keys, values and their like of all members, None for the older
    architectures, which the package has no estimate for."""

    checkpoint: Path
    table: tables.Table
    schema: tables.Schema
    task: str
    classes: tuple[str, ...]
    architecture: str
    precision: str | None
    cache_bytes: int | None

    @property
    def rows(self) -> int:
        return self.table.rows


def is_checkpoint(path: str) -> bool:
    """Whether ``-M`` names a single checkpoint file, as TabPFN's are."""
    return path.endswith(CHECKPOINTS) and Path(path).is_file()


def plan_fit(
    checkpoint: str, path: str | Path, target: str, *, task: str | None = None, cache_dtype: str | None = None
) -> TabpfnPlan:
    """Plan a fit; reads the table and the checkpoint's description. Raises UsageError for what does not fit, and
    ArtifactError for a file that is not a TabPFN checkpoint in safetensors."""
    tabpfn._check_package()
    if cache_dtype not in CACHE_PRECISIONS:
        named = ", ".join(name for name in CACHE_PRECISIONS if name)
        raise UsageError(f"TabPFN cannot keep a cache in {cache_dtype!r}", f"One of {named}")
    table = tables.read_table(path)
    schema = tables.infer_schema(table, target)
    if task is not None and task not in TASKS:
        raise UsageError(f"--task {task} is not known", f"One of {', '.join(TASKS)}")
    task = task or tables.guess_task(table, target)
    classes: tuple[str, ...] = ()
    if task == CLASSIFICATION:
        classes = tuple(tables.class_targets(table, target)[1])
    name, config, settings = _description(Path(checkpoint))
    if classes and len(classes) > config.max_num_classes:
        raise UsageError(
            f"'{target}' has {len(classes)} classes, and the checkpoint distinguishes {max(config.max_num_classes, 0)}",
            "Merge rare classes, or name a checkpoint for classification",
        )
    columns = [i for i, column in enumerate(schema.names) if column in schema.categories]
    size = _cache_bytes(name, config, settings, table.rows, len(schema.names), columns, task, cache_dtype)
    return TabpfnPlan(
        Path(checkpoint), table, schema, task, classes, name, CACHE_PRECISIONS[cache_dtype], size
    )


def fit_table(plan: TabpfnPlan, *, device: str = "auto", seed: int = 0) -> Any:
    """A `TabPFNClassifier` or `TabPFNRegressor` fitted on the planned table, with its cache."""
    import tabpfn as package

    columns = [i for i, name in enumerate(plan.schema.names) if name in plan.schema.categories]
    estimator_class: Any = (
        package.TabPFNClassifier if plan.task == CLASSIFICATION else package.TabPFNRegressor
    )
    estimator = estimator_class(
        model_path=str(plan.checkpoint),
        fit_mode="fit_with_cache",
        device=device,
        random_state=seed,
        kv_cache_precision=plan.precision,
        categorical_features_indices=columns or None,
    )
    x = tables.features(plan.table, plan.schema)
    if plan.task == CLASSIFICATION:
        y = tables.class_targets(plan.table, plan.schema.target, list(plan.classes))[0]
    else:
        y = tables.number_targets(plan.table, plan.schema.target)
    try:
        estimator.fit(x, y)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"TabPFN cannot be fitted on '{plan.table.path}': {reason}", "Change the table"
        ) from None
    return estimator


def save_table(plan: TabpfnPlan, estimator: Any, out: Path, *, overwrite: bool = False) -> Path:
    """Write the fitted estimator with the schema of its table."""
    schema = plan.schema.to_json() | {"classes": list(plan.classes)}
    return tabpfn.save(estimator, out, schema=schema, overwrite=overwrite)


def predict_table(
    estimator: Any,
    facts: dict[str, Any],
    path: str | Path,
    *,
    quantiles: tuple[float, ...] = QUANTILES,
    measure: bool = True,
) -> Predictions:
    """Predict each row of a table, as `loadstone.context.pfn.fit.predict_table` does. ``facts``: the context.json."""
    import torch

    table, schema, known = read_queries(path, facts["schema"], measure=measure)
    x = tables.features(table, schema)
    if facts["task"] == CLASSIFICATION:
        labels = [str(label) for label in facts["classes"]]
        # A class without a training row has no column.
        probabilities = np.zeros((len(x), len(labels)))
        probabilities[:, np.asarray(estimator.classes_, dtype=int)] = estimator.predict_proba(x)
        return classified(probabilities, labels, table, schema.target, measure=known)
    full = estimator.predict(x, output_type="full", quantiles=[float(q) for q in quantiles])
    criterion, logits = full["criterion"], full["logits"].float().cpu()
    criterion = criterion.to("cpu")
    with torch.no_grad():
        columns = {"mean": np.asarray(full["mean"], dtype=np.float64)}
        columns["std"] = criterion.variance(logits).sqrt().numpy().astype(np.float64)
        columns |= {f"q{q:g}": np.asarray(v) for q, v in zip(quantiles, full["quantiles"], strict=True)}
        if not known:
            return regressed(columns)
        targets = tables.number_targets(table, schema.target)
        y = torch.from_numpy(targets).float()
        log_prob = -criterion(logits, y).double().numpy()
        below = criterion.cdf(logits, y[:, None])[:, 0].double().numpy()
    return regressed(columns, (targets, log_prob, below))


def _description(path: Path) -> tuple[str, Any, Any]:
    """Architecture name, its parsed config and the inference config of a checkpoint."""
    found = _plain_values(path) if path.suffix == ".ckpt" else _metadata(path)
    try:
        from tabpfn.architectures import ARCHITECTURES
        from tabpfn.inference_config import InferenceConfig

        name = found.get("architecture_name", "tabpfn_v2")
        name = "tabpfn_v2_5" if name == "base" else name
        config = ARCHITECTURES[name].parse_config(found["config"])[0]
        given = found.get("inference_config")
        return name, config, InferenceConfig(**given) if given else None
    except LoadstoneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"'{path}' is not a TabPFN checkpoint ({reason})", "Name one with -M") from None


def _metadata(path: Path) -> dict[str, Any]:
    """What the header of a safetensors checkpoint says, weights left alone."""
    import json

    from loadstone.artifact.formats.safetensors import read_header

    try:
        return {
            key: json.loads(value) for key, value in read_header(path).metadata.items() if key != "format"
        }
    except ValueError:
        raise ArtifactError(f"'{path}' is not a TabPFN checkpoint", "Name one with -M") from None


def _plain_values(path: Path) -> dict[str, Any]:
    """What a ``.ckpt`` holds, read as tabpfn itself reads it: tensors and plain values only, nothing is run."""
    from loadstone.artifact.formats.bin import load_values

    found = load_values(path)
    if not isinstance(found, dict):
        raise ArtifactError(f"'{path}' is not a TabPFN checkpoint", "Name one with -M")
    return found


def _cache_bytes(
    name: str,
    config: Any,
    settings: Any,
    rows: int,
    features: int,
    categorical: list[int],
    task: str,
    precision: str | None,
) -> int | None:
    from importlib import import_module

    module = import_module(f"tabpfn.architectures.{name}")
    if not hasattr(module, "get_cache_size"):
        return None
    from tabpfn.preprocessing.ensemble import DEFAULT_N_ESTIMATORS

    asked = getattr(settings, "N_ESTIMATORS", "auto")
    members = asked if isinstance(asked, int) else DEFAULT_N_ESTIMATORS
    return sum(
        int(
            module.get_cache_size(
                n_train=rows,
                n_features=columns,
                model_config=config,
                task_type="multiclass" if task == CLASSIFICATION else "regression",
                base_dtype="autocast",
                kv_cache_precision=precision or "int8",
            )
        )
        for columns in _columns(settings, rows, features, categorical, members)
    )


def _columns(settings: Any, rows: int, features: int, categorical: list[int], members: int) -> list[int]:
    """How many columns the model will see of each member: preprocessing adds components and a fingerprint.

    One-hot columns depend on the values, and count as one.
    """
    from types import SimpleNamespace

    from tabpfn.preprocessing.datamodel import FeatureSchema
    from tabpfn.preprocessing.pipeline_factory import create_preprocessing_pipeline

    transforms = list(getattr(settings, "PREPROCESS_TRANSFORMS", ()))
    if not transforms:
        return [features] * members
    schema = FeatureSchema.from_only_categorical_indices(categorical, features)
    added = []
    for transform in transforms:
        config: Any = SimpleNamespace(
            preprocess_config=transform,
            polynomial_features=settings.POLYNOMIAL_FEATURES,
            add_fingerprint_feature=settings.FINGERPRINT_FEATURE,
            feature_shift_decoder=settings.FEATURE_SHIFT_METHOD,
            feature_shift_count=0,
            outlier_removal_std=None,
        )
        added.append(create_preprocessing_pipeline(config, random_state=0).num_added_features(rows, schema))
    # Members are spread over the transforms evenly, the first ones taking what is left over.
    share, left = divmod(members, len(transforms))
    return [features + more for i, more in enumerate(added) for _ in range(share + (i < left))]
