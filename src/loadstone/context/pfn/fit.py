"""From a table to a fitted context: the plan, whose memory is known beforehand, and the fit itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from loadstone.artifact import Artifact
from loadstone.context.pfn.bases import load_base
from loadstone.context.pfn.config import PFNConfig, check_task
from loadstone.context.pfn.layer_cache import parse_cache_dtype
from loadstone.context.pfn.layout import CACHE_DTYPE_NAMES, context_tensors, total_bytes
from loadstone.context.pfn.training_context import TrainingContext
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
from loadstone.errors import UsageError


@dataclass(frozen=True)
class FitPlan:
    """What `fit_table` will do. ``cache_bytes`` are the keys and values, ``total_bytes`` all that is stored: the
    context in memory, and its file but for a header of a few kB. No tensor has been made yet."""

    base: Artifact
    table: tables.Table
    schema: tables.Schema
    task: str
    classes: tuple[str, ...]
    cache_dtype: str
    cache_bytes: int
    total_bytes: int

    @property
    def rows(self) -> int:
        return self.table.rows


def plan_fit(
    base: Artifact, path: str | Path, target: str, *, task: str | None = None, cache_dtype: str | None = None
) -> FitPlan:
    """Plan the fit of ``base`` on the table at ``path``; reads the table and the base's config, no weights.

    ``task`` None is guessed from the target column; ``cache_dtype`` is float32 (default), bfloat16 or int8. Raises
    `UsageError` for a target, task or table that does not fit the base.
    """
    config = PFNConfig.from_dict(base.config)
    table = tables.read_table(path)
    schema = tables.infer_schema(table, target)
    if task is not None and task not in TASKS:
        raise UsageError(f"--task {task} is not known", f"One of {', '.join(TASKS)}")
    task = check_task(config, task or tables.guess_task(table, target))
    classes: tuple[str, ...] = ()
    if task == CLASSIFICATION:
        classes = tuple(tables.class_targets(table, target)[1])
        if len(classes) > config.classes:
            raise UsageError(
                f"'{target}' has {len(classes)} classes, and the model distinguishes {config.classes}",
                "Merge rare classes, or use --task regression for a number",
            )
    if len(schema.names) > config.max_features:
        raise UsageError(
            f"{len(schema.names)} features, and the model was made for at most {config.max_features}",
            "Choose fewer",
        )
    cache = parse_cache_dtype(cache_dtype, torch.float32)
    tensors = context_tensors(
        config,
        task=task,
        rows=table.rows,
        features=len(schema.names),
        classes=len(classes),
        cache=cache,
        model=torch.float32,
    )
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    return FitPlan(
        base,
        table,
        schema,
        task,
        classes,
        CACHE_DTYPE_NAMES[cache],
        total_bytes(layers),
        total_bytes(tensors),
    )


def fit_table(
    plan: FitPlan, *, source: str | None = None, device: str = "auto", seed: int = 0
) -> TrainingContext:
    """Load the base and fit it on the planned table. ``source`` is what to record as the base's place."""
    from dataclasses import replace

    model = load_base(source or plan.base.root, device=device)
    x = torch.from_numpy(tables.features(plan.table, plan.schema))
    if plan.task == CLASSIFICATION:
        y = torch.from_numpy(tables.class_targets(plan.table, plan.schema.target, list(plan.classes))[0])
    else:
        y = torch.from_numpy(tables.number_targets(plan.table, plan.schema.target))
    context = model.fit(
        x,
        y,
        task=plan.task,
        classes=plan.classes or None,
        feature_names=plan.schema.names,
        cache_dtype=plan.cache_dtype,
        seed=seed,
    )
    return replace(context, schema=plan.schema.to_json())


def predict_table(
    context: TrainingContext,
    path: str | Path,
    *,
    quantiles: tuple[float, ...] = QUANTILES,
    measure: bool = True,
) -> Predictions:
    """Predict each row of a table with the context's columns. Where the table has the target column, and unless
    ``measure`` is False, the predictions are measured too.

    Raises `SchemaMismatch` for other columns than the fitted ones.
    """
    table, schema, known = read_queries(path, context.schema or {}, measure=measure)
    queries = torch.from_numpy(tables.features(table, schema)).to(context.device)
    with torch.no_grad():
        if context.task == CLASSIFICATION:
            probabilities = context.probabilities(queries).cpu().numpy()
            labels = [str(label) for label in context.classes]
            return classified(probabilities, labels, table, schema.target, measure=known)
        posterior = context.posterior(queries)
        columns = {"mean": posterior.mean.cpu().numpy(), "std": posterior.std.cpu().numpy()}
        columns |= {f"q{q:g}": posterior.quantile(q).cpu().numpy() for q in quantiles}
        if not known:
            return regressed(columns)
        targets = tables.number_targets(table, schema.target)
        y = torch.from_numpy(targets).to(context.device)
        return regressed(
            columns, (targets, posterior.log_prob(y).cpu().numpy(), posterior.cdf(y).cpu().numpy())
        )
