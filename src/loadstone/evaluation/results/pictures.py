"""The pictures of the HTML report, drawn with matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.statistics import sums_between

_MOST_POINTS = 20_000
_LONGEST_NAME = 36
_INK, _MUTED = "#1d2433", "#68718a"
_COLOURS = ("#3056d3", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#e67700", "#495057")


@dataclass(frozen=True, eq=False)
class Picture:
    """A matplotlib figure with its file name (without suffix), title and a sentence on how to read it."""

    stem: str
    title: str
    note: str
    figure: Any


def draw(result: Evaluation, names: list[str]) -> list[Picture]:
    """Every picture that the result has values for. ``names``: of the models, in the order of the records."""
    names = [_shorten(name) for name in names]
    import matplotlib  # type: ignore[import-not-found]

    style = {
        "figure.dpi": 120,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _MUTED,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.titlelocation": "left",
        # A name with a dollar sign is a name, not a formula.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        drawn = (
            Picture(
                "size",
                "Loss against size",
                "Bars are one standard error of the difference to the reference (of a single model: of its loss).",
                _size(result, names),
            ),
            Picture(
                "documents",
                "Difference by document",
                "Mean loss minus the reference's, documents in order of it.",
                _documents(result, names),
            ),
            Picture(
                "tokens",
                "Loss of every token",
                "Each point is a token: the reference's loss across, the model's up.",
                _tokens(result, names),
            ),
            Picture(
                "kl",
                "KL divergence of every token",
                "From the reference's distribution, on a logarithmic scale.",
                _kl(result, names),
            ),
        )
    return [picture for picture in drawn if picture.figure is not None]


def _shorten(name: str) -> str:
    """A name that fits a legend: its beginning and its end, which say most."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def compared(result: Evaluation) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Path, losses and the reference's losses, float32 (tokens,) both, of every model that was compared."""
    if len(result.records) > len(result.values):
        # The reference is a saved result: no losses of single tokens, and its path may be that of a model here.
        return []
    base = result.values[result.records[0]["path"]]["nll"]
    return [
        (r["path"], result.values[r["path"]]["nll"], base)
        for r in result.records
        if r["delta_loss"] is not None
    ]


def _colour_of(result: Evaluation, path: str) -> str:
    number = [r["path"] for r in result.records].index(path)
    return _COLOURS[number % len(_COLOURS)]


def _name_of(result: Evaluation, names: list[str], path: str) -> str:
    return names[[r["path"] for r in result.records].index(path)]


def _figure(columns: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    # `Figure` itself, not pyplot: nothing global, and it works without a display.
    figure = Figure(figsize=(max(4.6, 3.6 * columns), height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _size(result: Evaluation, names: list[str]) -> Any:
    figure, (axis,) = _figure(1)
    for i, (name, r) in enumerate(zip(names, result.records, strict=True)):
        x, colour = r["bits_per_parameter"], _COLOURS[i % len(_COLOURS)]
        # Paired: the error of the losses themselves is the text's, shared by all, and would bury the difference.
        error = r["loss_stderr"] if len(result.records) == 1 else r["delta_loss_stderr"]
        axis.errorbar(x, r["loss"], yerr=error or 0, fmt="o", color=colour, capsize=3, label=name)
    axis.set_xlabel("stored bits per parameter")
    axis.set_ylabel("loss, nats per token")
    axis.margins(x=0.2)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _documents(result: Evaluation, names: list[str]) -> Any:
    models = compared(result)
    if not models:
        return None
    figure, (axis,) = _figure(1)
    figure.set_size_inches(8, 3.4)
    assert result.task is not None
    stream = result.task.stream
    tokens = stream.tokens.texts
    for path, nll, base in models:
        differences = partial(_differences, nll, base)
        apart = sums_between(stream.slots, differences) / np.maximum(tokens, 1)
        label, colour = _name_of(result, names, path), _colour_of(result, path)
        axis.plot(np.sort(apart[tokens > 0]), ".", color=colour, label=label, markersize=4)
    axis.axhline(0, color=_MUTED, linewidth=0.8)
    axis.set_xlabel("document")
    axis.set_ylabel("Δ loss")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _differences(nll: np.ndarray, base: np.ndarray, some: slice) -> np.ndarray:
    return nll[some].astype(np.float64) - base[some]


def _tokens(result: Evaluation, names: list[str]) -> Any:
    models = compared(result)
    if not models:
        return None
    figure, axes = _figure(len(models))
    for axis, (path, nll, base) in zip(axes, models, strict=True):
        # Evenly spaced, so that every part of the text is seen.
        some = np.linspace(0, len(nll) - 1, min(len(nll), _MOST_POINTS)).astype(int)
        axis.plot(base[some], nll[some], ".", color=_colour_of(result, path), markersize=1.5, alpha=0.35)
        top = float(max(base[some].max(), nll[some].max()))
        axis.plot([0, top], [0, top], color=_INK, linewidth=0.8)
        axis.set_title(_name_of(result, names, path), fontsize=9)
        axis.set_xlabel("reference, nats")
    axes[0].set_ylabel("model, nats")
    return figure


def _kl(result: Evaluation, names: list[str]) -> Any:
    measured = [
        (name, result.values[r["path"]]["kl"], _COLOURS[i % len(_COLOURS)])
        for i, (name, r) in enumerate(zip(names, result.records, strict=True))
        if "kl" in result.values.get(r["path"], {})
    ]
    if not measured:
        return None
    figure, (axis,) = _figure(1)
    figure.set_size_inches(8, 3.4)
    for name, kl, colour in measured:
        axis.hist(np.log10(np.maximum(kl, 1e-9)), bins=80, histtype="step", color=colour, label=name)
    axis.set_xlabel("log10 of KL, nats")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False, fontsize=8)
    return figure
