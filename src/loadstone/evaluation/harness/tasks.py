"""``--tasks``: run lm-eval tasks on a loaded model, the requests divided among processes, with paired differences to
the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.errors import MissingError, UsageError
from loadstone.evaluation.causal import Vocabulary
from loadstone.ranks import Ranks

# lm-eval writes "acc,none": metric, comma, filter.
_STDERR = "_stderr"
# Batches in a piece of the work: few, so that pieces divide evenly; several, so that requests can be sorted.
_PIECE_BATCHES = 8


@dataclass(frozen=True, eq=False)
class TaskScore:
    """One metric of one task. ``samples``: its value on each example by the example's id, empty if the
    metric is not a mean over examples."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    samples: dict[int, float]


@lru_cache(maxsize=1)
def task_manager(names: tuple[str, ...], include: str | None) -> Any:
    """lm-eval's index of tasks. ``include``: a folder of task YAMLs besides its own.

    Raises MissingError without lm-eval, UsageError for a task that it does not know.
    """
    try:
        import lm_eval.tasks

        import loadstone.evaluation.harness.sharing_lm  # noqa: F401
    except ImportError:
        raise MissingError("--tasks needs lm-eval", "pip install 'loadstone[tasks]'") from None
    if include is not None and not Path(include).exists():
        raise UsageError(f"--task-path: there is no folder '{include}'")
    manager = lm_eval.tasks.TaskManager(include_path=include)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UsageError(
            f"lm-eval knows no task {', '.join(unknown)}", "Give the folder of its YAML with --task-path"
        )
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: tuple[str, ...],
    *,
    include: str | None,
    limit: int | None,
    batch_size: int,
    ranks: Ranks = Ranks(),
    share: bool = True,
    vocabulary: Vocabulary | None = None,
    separator_id: int | None = None,
) -> list[TaskScore]:
    """Run lm-eval tasks (``include``: a folder of task YAMLs besides lm-eval's own) on a loaded model.

    Each process computes every ``ranks.size``-th piece of the requests; the pieces do not depend on their
    number, so the scores do not either. ``share``: compute common prefixes of the requests of a piece once.
    ``vocabulary``: the model's, which the tasks' tokens must fit. ``separator_id``: what requests begin with where the
    tokenizer has neither BOS nor EOS.
    A model after a prefix (`head.PrefixedModel`) answers every request after it. Raises as `task_manager` does.
    """
    manager = task_manager(names, include)
    import lm_eval

    from loadstone.evaluation.harness.sharing_lm import SharingLM

    class Divided(SharingLM):  # type: ignore[misc]
        """lm-eval sees one process; its requests are computed by all of them."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return divide(super().loglikelihood, requests, batch_size, ranks)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return divide(super().loglikelihood_rolling, requests, batch_size, ranks)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return divide(super().generate_until, requests, batch_size, ranks)

    adapter = Divided(
        model,
        tokenizer,
        batch_size=batch_size,
        share=share,
        vocabulary=vocabulary,
        separator_id=separator_id,
    )
    results = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    if results is None:  # lm-eval reports on the first process only
        return []
    return [
        score
        for task, figures in results["results"].items()
        for score in _scores(
            task, figures, results["samples"].get(task, ()), results["higher_is_better"].get(task, {})
        )
    ]


def divide(compute: Callable[..., Any], requests: Sequence[Any], batch_size: int, ranks: Ranks) -> list[Any]:
    """Results of lm-eval requests, in order: ``compute`` is called with pieces of them.

    A piece holds requests of similar length; those with one context, which lm-eval computes once, are adjacent.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), requests[i].args[0], i))
    size = _PIECE_BATCHES * batch_size
    pieces = [order[at : at + size] for at in range(0, len(order), size)]
    mine: dict[int, Any] = {}
    for piece in pieces[ranks.rank :: ranks.size]:
        mine.update(zip(piece, compute([requests[i] for i in piece], disable_tqdm=True), strict=True))
    whole: dict[int, Any] = {}
    for part in ranks.gather(mine):
        whole |= part
    return [whole[i] for i in range(len(requests))]


def _scores(task: str, figures: dict[str, Any], samples: Any, higher: dict[str, Any]) -> list[TaskScore]:
    found = []
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith(_STDERR) or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}{_STDERR},{chosen}")
        each = {
            int(s["doc_id"]): float(s[metric])
            for s in samples
            if isinstance(s.get(metric), int | float | bool) and s.get("filter", chosen) == chosen
        }
        found.append(
            TaskScore(
                task,
                metric if chosen == "none" else key,
                float(value),
                float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                bool(higher.get(metric, True)),
                each,
            )
        )
    return found


def task_records(scores: list[TaskScore], reference: list[TaskScore] | None) -> list[dict[str, Any]]:
    """The ``tasks`` of a model's JSON record; with a reference, paired by example: the difference of each
    example is taken first, so that the difficulty of an example does not add to the error."""
    others = {(s.task, s.metric): s for s in reference or ()}
    return [
        {
            "task": s.task,
            "metric": s.metric,
            "value": s.value,
            "stderr": s.stderr if s.stderr is not None else _mean_error(list(s.samples.values())),
            "examples": len(s.samples) or None,
            "higher_is_better": s.higher_is_better,
            **_paired(s, others.get((s.task, s.metric))),
        }
        for s in scores
    ]


def _paired(score: TaskScore, other: TaskScore | None) -> dict[str, Any]:
    if other is None:
        return {"delta": None, "delta_stderr": None, "p_value": None}
    shared = sorted(score.samples.keys() & other.samples.keys())
    apart = [score.samples[i] - other.samples[i] for i in shared]
    error = _mean_error(apart)
    p_value = None
    if error == 0:
        # All examples differ by the same amount: zero, or an amount that chance cannot explain.
        p_value = 0.0 if any(apart) else 1.0
    elif error is not None:
        # Two-sided, from the normal distribution of a mean of paired differences.
        p_value = math.erfc(abs(float(np.mean(apart))) / error / math.sqrt(2))
    return {"delta": score.value - other.value, "delta_stderr": error, "p_value": p_value}


def _mean_error(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
