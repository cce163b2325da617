"""``--report DIR``: one self-contained HTML page, and its pictures as PNG files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from loadstone.errors import MissingError, UsageError
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.documents import document_tokens, rank_documents
from loadstone.evaluation.results.pictures import compared, draw
from loadstone.evaluation.results.tables import Table, tables
from loadstone.writing.filesystem import replacing
from loadstone.writing.publish import can_write

_WORST_DOCUMENTS = 3
# Tokens shown of a document: a page stays small, and the beginning tells what the text is.
_SHOWN_TOKENS = 600
# Losses, in nats, at which a token's background is palest and strongest: 0.5 is a probability of 0.6, 8 of 0.0003.
_PALE, _STRONG = 0.5, 8.0
# A token that costs this much more than the reference, in nats, is underlined.
_MUCH_WORSE = 0.5
_STYLE = """
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:#1d2433;max-width:1240px;margin:2rem auto;padding:0 1rem}
p,h3,.word,.text,code{overflow-wrap:anywhere}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2rem} h3{font-size:.95rem;margin:1.2rem 0 .2rem}
p{color:#68718a;margin:.3rem 0} img{max-width:100%}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}
td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #e3e6ee} td{white-space:nowrap}
th{color:#68718a;font-weight:600;vertical-align:bottom} .word{text-align:left;white-space:normal;min-width:6rem}
.failed{color:#c92a2a;font-weight:600} .passed{color:#2b8a3e;font-weight:600} code{background:#f1f3f9;padding:0 .3em}
.text{color:#1d2433;white-space:pre-wrap;line-height:1.8;border-left:3px solid #e3e6ee;padding-left:.8rem}
.text span{border-radius:2px} .text u{text-decoration:underline 2px #c92a2a;text-underline-offset:3px}
.legend span{padding:0 .4em;color:#1d2433}
@media (max-width:1000px){
table,tbody,tr,td{display:block} thead{display:none} tr{border:1px solid #e3e6ee;border-radius:6px;margin:.7rem 0}
td{display:flex;justify-content:space-between;gap:1rem;white-space:normal} td:last-child{border-bottom:0}
td:empty{display:none} td::before{content:attr(data-name);color:#68718a;font-weight:600;text-align:left}
td::before{white-space:nowrap} td.word:first-child{font-weight:600} td.word:first-child::before{content:none}
}
"""


def check_report(directory: Path) -> None:
    """Raise MissingError without matplotlib, UsageError if ``directory`` cannot be written: before the evaluation."""
    if not can_write(directory):
        raise UsageError(f"--report {directory} cannot be written", "Choose another place")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--report {directory} is a file", "Name a directory")
    if find_spec("matplotlib") is None:
        raise MissingError("--report needs matplotlib", "pip install 'loadstone[report]'")


def write_report(result: Evaluation, directory: Path) -> Path:
    """Write ``index.html`` and its PNGs; returns the page's path. Raises as `check_report` does."""
    check_report(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = short_names([r["path"] for r in result.records])
    sections = []
    for picture in draw(result, names):
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png", bbox_inches="tight")
        with replacing(directory / f"{picture.stem}.png") as file:
            file.write(buffer.getvalue())
        image = base64.b64encode(buffer.getvalue()).decode()
        sections.append(
            f"<h2>{picture.title}</h2><p>{picture.note}</p>"
            f'<img alt="{picture.title}" src="data:image/png;base64,{image}">'
        )
    page = directory / "index.html"
    with replacing(page) as file:
        file.write(_page(result, names, sections).encode())
    return page


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path, or as many parts as make the names different."""
    for depth in range(1, max(len(Path(p).parts) for p in paths) + 1):
        names = ["/".join(Path(p).parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return paths


def _page(result: Evaluation, names: list[str], pictures: Sequence[str]) -> str:
    shown = [
        n + (" (reference)" if r["reference"] else "") for n, r in zip(names, result.records, strict=True)
    ]
    first, *others = tables(result.records, names=shown, report=True)
    gates = (
        f'<p><code>{html.escape(v.gate)}</code> <span class="{"failed" if v.failed else "passed"}">'
        f"{'failed' if v.failed else 'passed'}</span> for {html.escape(v.model)}: {v.value:.6g}</p>"
        for v in result.verdicts
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>loadstone eval</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>loadstone eval</h1><p>{html.escape(result.description)}</p>",
        f"<p>{html.escape(result.note)}</p>",
        _table(first),
        *gates,
        *(f"<h2>{html.escape(table.title)}</h2>{_table(table)}" for table in others),
        *pictures,
        *_documents(result, names),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _table(table: Table) -> str:
    kinds = [' class="word"' if i < table.left else "" for i in range(len(table.columns))]
    head = "".join(f"<th{k}>{html.escape(c)}</th>" for k, c in zip(kinds, table.columns, strict=True))
    # On a narrow screen a row becomes a block, and each cell shows its column's name.
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td{k} data-name="{html.escape(c)}">{html.escape(cell)}</td>'
            for k, c, cell in zip(kinds, table.columns, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _documents(result: Evaluation, names: list[str]) -> list[str]:
    """The documents that each model does worst on, with the loss of every token in colour."""
    if result.task is None:
        return []
    references = {path: base for path, _, base in compared(result)}
    legend = "".join(f'<span style="{_colour(v)}">{v:g}</span>' for v in (0, 1, 2, 4, 8))
    parts = [
        f'<h2>Worst documents, token by token</h2><p class="legend">Background: the loss of each token in nats {legend}'
        + (f"; underlined: more than {_MUCH_WORSE} above the reference's" if references else "")
        + ". Point at a token for its figures.</p>"
    ]
    for name, record in zip(names, result.records, strict=True):
        path = record["path"]
        if path not in result.values or (references and path not in references):
            continue
        losses, base = result.values[path]["nll"], references.get(path)
        ranked = rank_documents(
            losses if base is None else losses - base, result.task.stream, _WORST_DOCUMENTS
        )
        for document, mean in ranked:
            figure = f"loss {mean:.4f}" if base is None else f"Δ loss {mean:+.4f}"
            parts.append(f"<h3>{html.escape(name)}: document {document}, {figure}</h3>")
            parts.append(f'<p class="text">{_tokens(result, document, losses, base)}</p>')
    return parts


def _tokens(result: Evaluation, document: int, losses: np.ndarray, base: np.ndarray | None) -> str:
    assert result.task is not None
    stream, tokenizer = result.task.stream, result.task.tokenizer
    tokens = document_tokens(document, losses, stream, tokenizer, _SHOWN_TOKENS)
    others = None if base is None else document_tokens(document, base, stream, tokenizer, _SHOWN_TOKENS)
    parts = []
    for i, token in enumerate(tokens):
        text, title = html.escape(token.text), f"loss {token.value:.2f}"
        if others is not None:
            title += f", reference {others[i].value:.2f}"
            if token.value - others[i].value > _MUCH_WORSE:
                text = f"<u>{text}</u>"
        parts.append(f'<span style="{_colour(token.value)}" title="{title}">{text}</span>')
    more = stream.tokens.texts[document] > _SHOWN_TOKENS
    return "".join(parts) + (" …" if more else "")


def _colour(loss: float) -> str:
    share = min(max((loss - _PALE) / (_STRONG - _PALE), 0.0), 1.0)
    return f"background:rgba(217,72,15,{0.65 * share:.2f})"
