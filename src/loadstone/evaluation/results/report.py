"""``--report DIR``: one self-contained HTML page, and its pictures as PNG files."""

from __future__ import annotations

import base64
import html
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loadstone.errors import MissingError, UsageError
from loadstone.writing.publish import can_write

if TYPE_CHECKING:
    from loadstone.evaluation.run import Outcome

_MOST_POINTS = 20_000
_INK, _MUTED = "#1d2433", "#68718a"
_COLOURS = ("#3056d3", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#e67700", "#495057")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2433;max-width:1240px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2rem} p{color:#68718a;margin:.3rem 0}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}
td,th{white-space:nowrap;padding:.3rem .7rem;text-align:right;border-bottom:1px solid #e3e6ee}
td:first-child,th:first-child{text-align:left} th{color:#68718a;font-weight:600} img{max-width:100%}
.failed{color:#c92a2a;font-weight:600} .passed{color:#2b8a3e;font-weight:600} code{background:#f1f3f9;padding:0 .3em}
"""


def check_report(directory: Path) -> None:
    """Raises MissingError without matplotlib, UsageError when ``directory`` cannot be one: before the work."""
    if not can_write(directory):
        raise UsageError(f"--report {directory} cannot be written", "Choose another place")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--report {directory} is a file", "Name a directory")
    if find_spec("matplotlib") is None:
        raise MissingError("--report needs matplotlib", "pip install 'loadstone[report]'")


def write_report(outcome: Outcome, directory: Path, description: str) -> Path:
    """Write ``index.html`` and its PNGs; the page's path. Raises as `check_report` does."""
    check_report(directory)
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "figure.dpi": 120,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _MUTED,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.titlelocation": "left",
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    names = short_names([r["path"] for r in outcome.records])
    sections = []
    for stem, title, note, draw in (
        (
            "size",
            "Loss against size",
            "Bars are one standard error of the difference to the reference (of a single model: of its loss).",
            _size,
        ),
        (
            "documents",
            "Difference by document",
            "Mean loss minus the reference's, documents in order of it.",
            _documents,
        ),
        (
            "tokens",
            "Loss of every token",
            "Each point a token: the reference's loss across, the model's up.",
            _tokens,
        ),
        (
            "kl",
            "KL divergence of every token",
            "From the reference's distribution, on a logarithmic scale.",
            _kl,
        ),
    ):
        figure = draw(outcome, names)
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        (directory / f"{stem}.png").write_bytes(buffer.getvalue())
        image = base64.b64encode(buffer.getvalue()).decode()
        sections.append(
            f'<h2>{title}</h2><p>{note}</p><img alt="{title}" src="data:image/png;base64,{image}">'
        )
    page = directory / "index.html"
    page.write_text(_page(outcome, names, description, "\n".join(sections)), encoding="utf-8")
    return page


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path, or as much of it as tells them apart."""
    for depth in range(1, max(len(Path(p).parts) for p in paths) + 1):
        names = ["/".join(Path(p).parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return paths


def _page(outcome: Outcome, names: list[str], description: str, pictures: str) -> str:
    rows = "".join(_row(name, record) for name, record in zip(names, outcome.records, strict=True))
    gates = "".join(
        f'<p><code>{html.escape(v.gate)}</code> <span class="{"failed" if v.failed else "passed"}">'
        f"{'failed' if v.failed else 'passed'}</span> for {html.escape(v.model)}: {v.value:.6g}</p>"
        for v in outcome.verdicts
    )
    heads = (
        "model",
        "loss",
        "perplexity",
        "bits/byte",
        "Δ loss",
        "Δ ppl",
        "KL",
        "same top-1",
        "MB",
        "tokens/s",
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>loadstone eval</title>'
        f"<style>{_STYLE}</style></head><body><h1>loadstone eval</h1><p>{html.escape(description)}</p>"
        f"<p>± one standard error, by bootstrap over {html.escape(outcome.task.protocol.resampled)}</p>"
        f"<table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{rows}</table>{gates}{pictures}</body></html>\n"
    )


def _row(name: str, r: dict[str, Any]) -> str:
    def pm(value: str, form: str) -> str:
        if r.get(value) is None:
            return ""
        error = r.get(f"{value}_stderr")
        return f"{r[value]:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")

    relative = r["delta_perplexity_relative"]
    cells = (
        html.escape(name) + (" (reference)" if r["reference"] else ""),
        pm("loss", ".4f"),
        pm("perplexity", ".3f"),
        pm("bits_per_byte", ".4f"),
        pm("delta_loss", "+.4f"),
        "" if relative is None else f"{100 * relative:+.2f} %",
        pm("kl", ".5f"),
        "" if "kl" not in r else f"{100 * r['top1_agreement']:.2f} %",
        f"{r['weight_bytes'] / 1e6:.1f}",
        "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}",
    )
    return f"<tr>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _figure(columns: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    # `Figure` itself, not pyplot: nothing global, and it works without a display.
    figure = Figure(figsize=(max(4.6, 3.6 * columns), height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _size(outcome: Outcome, names: list[str]) -> Any:
    figure, (axis,) = _figure(1)
    for i, (name, r) in enumerate(zip(names, outcome.records, strict=True)):
        x, colour = r["bits_per_parameter"], _COLOURS[i % len(_COLOURS)]
        # Paired: the error of the losses themselves is the text's, shared by all, and would bury the difference.
        error = r["loss_stderr"] if len(outcome.records) == 1 else r["delta_loss_stderr"]
        axis.errorbar(x, r["loss"], yerr=error or 0, fmt="o", color=colour, capsize=3, label=name)
    axis.set_xlabel("stored bits per parameter")
    axis.set_ylabel("loss, nats per token")
    axis.margins(x=0.2)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _compared(outcome: Outcome, names: list[str]) -> list[tuple[str, np.ndarray, np.ndarray, str]]:
    """Name, losses, the reference's losses, and colour of every model that was compared."""
    if len(outcome.records) > len(outcome.values):
        # The reference is a saved result, which has no losses of single tokens, and maybe the path of a model here.
        return []
    base = outcome.values[outcome.records[0]["path"]]["nll"]
    return [
        (name, outcome.values[r["path"]]["nll"], base, _COLOURS[i % len(_COLOURS)])
        for i, (name, r) in enumerate(zip(names, outcome.records, strict=True))
        if r["delta_loss"] is not None
    ]


def _documents(outcome: Outcome, names: list[str]) -> Any:
    compared = _compared(outcome, names)
    if not compared:
        return None
    figure, (axis,) = _figure(1)
    figure.set_size_inches(8, 3.4)
    owner = outcome.task.stream.document[outcome.task.stream.scored]
    tokens = np.bincount(owner)
    for name, nll, base, colour in compared:
        apart = np.bincount(owner, weights=nll.astype(np.float64) - base) / np.maximum(tokens, 1)
        axis.plot(np.sort(apart[tokens > 0]), ".", color=colour, label=name, markersize=4)
    axis.axhline(0, color=_MUTED, linewidth=0.8)
    axis.set_xlabel("document")
    axis.set_ylabel("Δ loss")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _tokens(outcome: Outcome, names: list[str]) -> Any:
    compared = _compared(outcome, names)
    if not compared:
        return None
    figure, axes = _figure(len(compared))
    for axis, (name, nll, base, colour) in zip(axes, compared, strict=True):
        # Evenly spaced, so that every part of the text is seen.
        some = np.linspace(0, len(nll) - 1, min(len(nll), _MOST_POINTS)).astype(int)
        axis.plot(base[some], nll[some], ".", color=colour, markersize=1.5, alpha=0.35)
        top = float(max(base[some].max(), nll[some].max()))
        axis.plot([0, top], [0, top], color=_INK, linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("reference, nats")
    axes[0].set_ylabel("model, nats")
    return figure


def _kl(outcome: Outcome, names: list[str]) -> Any:
    measured = [
        (name, outcome.values[r["path"]]["kl"], _COLOURS[i % len(_COLOURS)])
        for i, (name, r) in enumerate(zip(names, outcome.records, strict=True))
        if "kl" in outcome.values.get(r["path"], {})
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
