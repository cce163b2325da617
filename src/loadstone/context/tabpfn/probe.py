"""Probe: two random rows and their predictions, stored to detect a machine that computes differently.

Checked by the first prediction after a load, not by the load: it takes a pass through the model and moves the caches to
the device. On the same kind of processor with the same libraries it is not checked, unless `check` is called. Contexts
without a cache have no probe: every prediction reads the training rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loadstone.artifact.context_errors import CorruptContext, ProbeFailed

log = logging.getLogger(__name__)

ROWS = 2
# Predictions stored for each member and row, evenly spaced: a regressor has thousands of bars.
_ANSWERS = 64
# Largest difference, relative to the largest answer: in float32 anywhere, in half precision on the same kind of device
# and on another.
TOLERANCES = {"full": 2e-3, "half": 0.02, "other device": 0.1}
# These draw random numbers on the device they compute on, so another device gives other predictions.
_DRAWS_ON_DEVICE = ("TabPFN-v2", "TabPFN-v2.5", "TabPFN-v2.6")
# Attribute of a loaded engine that holds its probe.
ATTRIBUTE = "_loadstone_probe"


@dataclass(frozen=True, eq=False)
class Probe:
    """``queries``: float64 (rows, columns) as the engine takes them; ``answers``: float32 (members, rows, answers).
    ``device`` and ``full``: where they were computed, and whether in float32 or better. ``computer``: the processor and
    the libraries, in words."""

    queries: Tensor
    answers: Tensor
    device: str
    full: bool
    computer: str

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "full": self.full, "computer": self.computer}

    def tensors(self) -> dict[str, Tensor]:
        return {"probe.queries": self.queries, "probe.answers": self.answers}

    def tolerance(self, estimator: Any) -> float:
        """Largest allowed difference on the device of ``estimator``, relative to the largest prediction."""
        if self.full and _in_full(estimator):
            return TOLERANCES["full"]
        return TOLERANCES["half" if self.device == _device(estimator) else "other device"]


def probe_of(estimator: Any) -> Probe | None:
    """The probe of a fitted estimator: the recorded one of a loaded estimator, else a new one; None without a cache."""
    engine = estimator.executor_
    if getattr(engine, ATTRIBUTE, None) is not None:
        return getattr(engine, ATTRIBUTE)  # type: ignore[no-any-return]
    if not getattr(engine, "kv_caches", None):
        return None
    queries = _queries(estimator)
    try:
        answers = _answers(estimator, queries)
    except Exception as error:
        log.warning("saved without a probe: %s", " ".join(str(error).split())[:200])
        return None
    return Probe(queries, answers, _device(estimator), _in_full(estimator), computer(estimator))


def install(estimator: Any, probe: Probe, *, check_first: bool) -> None:
    """Keep ``probe`` with a loaded estimator, and have its first prediction check it where asked to."""
    setattr(estimator.executor_, ATTRIBUTE, probe)
    if check_first:
        estimator.executor_.iter_outputs = _First(estimator)


def check(estimator: Any) -> float | None:
    """Compute the probe here; returns the largest difference, relative to the largest answer. Raises `ProbeFailed`.

    Gives None, with a warning, where the package itself predicts otherwise on another kind of device.
    """
    probe: Probe = getattr(estimator.executor_, ATTRIBUTE)
    waiting = vars(estimator.executor_).pop("iter_outputs", None)
    here = _device(estimator)
    if probe.device != here and any(config.name in _DRAWS_ON_DEVICE for config in estimator.configs_):
        log.warning(
            "fitted on %s: this architecture draws random numbers on the device it computes on, so predictions on %s "
            "differ; predict where it was fitted, or fit it again here",
            probe.device, here,
        )  # fmt: skip
        return None
    try:
        found = _answers(estimator, probe.queries)
        if found.shape != probe.answers.shape:
            raise CorruptContext("the probe has another shape than the predictions", "Save it again")
        largest = probe.answers.abs().max().clamp(min=1e-6)
        difference = ((found - probe.answers).abs().max() / largest).item()
        tolerance = probe.tolerance(estimator)
        # `not <=` and not `>`: a NaN fails too.
        if not difference <= tolerance:
            raise ProbeFailed(
                f"the probe's answers differ by {difference:.2g} here, {tolerance:g} is allowed",
                "The machine or a library computes differently from where it was fitted: fit it again here, or load it "
                "with probe=False",
            )
    except Exception:
        if waiting is not None:
            estimator.executor_.iter_outputs = waiting
        raise
    return difference


class _First:
    """Replaces an engine's ``iter_outputs`` until its probe has been checked or needs no check."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def __call__(self, *args: Any, **options: Any) -> Any:
        engine = self.estimator.executor_
        if getattr(engine, ATTRIBUTE).computer == computer(self.estimator):
            del engine.iter_outputs
        else:
            check(self.estimator)
        return engine.iter_outputs(*args, **options)


def _queries(estimator: Any) -> Tensor:
    """Rows as an engine takes them: numbers, and codes where a column is categorical. No training row is in them."""
    from tabpfn.preprocessing.datamodel import FeatureModality

    schema = estimator.inferred_feature_schema_
    rows = np.random.default_rng(0).normal(size=(ROWS, len(schema.features)))
    for column in schema.indices_for(FeatureModality.CATEGORICAL):
        rows[:, column] = np.arange(ROWS)
    return torch.from_numpy(rows)


def _answers(estimator: Any, queries: Tensor) -> Tensor:
    classifies = type(estimator).__name__ == "TabPFNClassifier"
    outputs = estimator.executor_.iter_outputs(
        queries.numpy(),
        autocast=estimator.use_autocast_,
        task_type="multiclass" if classifies else "regression",
    )
    found = torch.stack([output.detach().float().cpu() for output, _ in outputs])
    step = max(1, found.shape[-1] // _ANSWERS)
    return found[..., ::step].contiguous()


def computer(estimator: Any) -> str:
    """The processors and libraries that an estimator's predictions depend on, as text."""
    import platform
    from importlib.metadata import version

    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_name(d) for d in estimator.devices_ if d.type == "cuda"]
    libraries = [f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "scikit-learn")]
    return ", ".join([cpu, *gpus, *libraries])


def _device(estimator: Any) -> str:
    return str(estimator.devices_[0].type)


def _in_full(estimator: Any) -> bool:
    dtype = estimator.forced_inference_dtype_
    return not estimator.use_autocast_ and (dtype is None or dtype.itemsize >= 4)
