from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.errors import MissingError
from loadstone.evaluation.options import Options
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.documents import document_tokens, rank_documents
from loadstone.evaluation.results.gates import parse_gate
from loadstone.evaluation.results.report import short_names, write_report
from loadstone.evaluation.run import run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script>"
TASK = {"task": "quiz", "metric": "acc", "value": 0.25, "stderr": 0.01, "delta": -0.125, "delta_stderr": 0.02,
        "p_value": 0.03}  # fmt: skip
SPEED = {"batch_size": 16, "compiled": False, "prefill_tokens_per_second": 1234.0, "first_token_seconds": 0.25,
         "decode_tokens_per_second": 99.5, "peak_memory_bytes": 2**30}  # fmt: skip


@pytest.fixture(scope="module")
def result(model_dir: Path, worse_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Two models with everything a report shows; the last document holds markup, and so do the names."""
    pytest.importorskip("matplotlib")
    # Not slashes: names of models are the last parts of paths.
    data = tmp_path_factory.mktemp("text") / "text.jsonl"
    markup = "<b>&amp;</b><script>alert(2)</script> — é 漢字 "
    texts = ["A calm sentence about nothing much. " * 9, "Another one, as calm. " * 12, markup * 4]
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = Options((str(model_dir), str(worse_dir)), data=str(data), divergence=True)
    found = run(replace(options, gates=(parse_gate("dloss>-1"),)))
    base, worse = found.records
    long = "/models/a-rather-long-name-of-a-model-that-somebody-quantized-with-int8-dynamic-act-int4-weight"
    paths = {base["path"]: f"{long}-reference", worse["path"]: long + EVIL.replace("/", "")}
    records = tuple({**r, "path": paths[r["path"]], "tasks": [TASK], "speed": [SPEED]} for r in found.records)
    return replace(
        found, records=records, values={paths[k]: v for k, v in found.values.items()},
        description="text & <protocol>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(result: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(result, tmp_path_factory.mktemp("new") / "report")


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_stands_alone(result: Evaluation, page: Path) -> None:
    assert {p.name for p in page.parent.iterdir()} == {
        "index.html", "size.png", "documents.png", "tokens.png", "kl.png"
    }  # fmt: skip
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4 and not re.search(r"(src|href)=\"(?!data:)", text)
    assert "text &amp; &lt;protocol&gt;" in text and 'class="failed"' in text
    assert f"{result.records[1]['delta_loss']:+.4f}" in text


def test_tables_of_tasks_and_speed(page: Path) -> None:
    text = page.read_text()
    for cell in ("quiz", "acc", "0.2500 ± 0.0100", "-0.1250 ± 0.0200", "1234", "250", "99.5", "1024"):
        assert re.search(rf"<td[^>]*>{re.escape(cell)}</td>", text), cell
    assert "<h2>Tasks</h2>" in text and "<h2>Speed</h2>" in text and "size MB" in text


def test_names_and_documents_are_text_not_markup(page: Path) -> None:
    tags = Tags()
    tags.feed(page.read_text())
    assert "script" not in tags.tags and "b" not in tags.tags
    assert "<b>&amp;</b><script>" in tags.text and "int4-weight<script>alert(1)" in tags.text


def test_documents_token_by_token(result: Evaluation, page: Path) -> None:
    """Every token of text is there once, with its loss, in reading order."""
    assert result.task is not None
    path = result.records[1]["path"]
    losses, stream = result.values[path]["nll"], result.task.stream
    apart = losses - result.values[result.records[0]["path"]]["nll"]
    (worst, mean), *_ = rank_documents(apart, stream, 3)
    owner = stream.document[stream.scored]
    means = [float(apart[owner == d].mean(dtype=np.float64)) for d in range(3)]
    assert worst == int(np.argmax(means)) and mean == pytest.approx(max(means), rel=1e-6)
    for document, text in enumerate(stream.corpus.documents):
        tokens = document_tokens(document, losses, stream, result.task.tokenizer, 10_000)
        assert "".join(t.text for t in tokens) == text
        total = losses[owner == document].sum(dtype=np.float64)
        assert sum(t.value for t in tokens) == pytest.approx(total, rel=1e-6)
    tokens = document_tokens(worst, losses, stream, result.task.tokenizer, 10_000)
    others = document_tokens(worst, losses - apart, stream, result.task.tokenizer, 10_000)
    assert f'title="loss {tokens[0].value:.2f}, reference {others[0].value:.2f}"' in page.read_text()


def test_one_model_alone(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_report(run(Options((str(model_dir),), limit=2)), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "size.png"}
    assert 'title="loss ' in page.read_text() and "underlined" not in page.read_text()


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("width", [390, 1200])
def test_fits_the_window_of_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """On a phone and in a 1,200-pixel window nothing is cut off, and nothing needs scrolling sideways."""
    # The page has no script of its own: this one, in a document around it, writes down what the browser shows. A frame
    # can be as narrow as a phone, which a browser's window cannot.
    probe = """<!doctype html><title>waiting</title>
    <iframe id="f" style="border:0;width:WIDTHpx;height:900px"></iframe>
    <script>
      const frame = document.getElementById("f")
      frame.onload = () => {
        const d = frame.contentDocument
        const images = [...d.images].filter(i => !i.complete || i.naturalWidth < 200).length
        const out = [...d.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > WIDTH + 0.5
          || getComputedStyle(e).display != "inline" && e.scrollWidth > e.clientWidth + 1)
        document.title = `width ${d.documentElement.scrollWidth} images ${d.images.length} broken ${images} ` +
          `outside ${out.length}`
      }
      frame.srcdoc = PAGE
    </script>"""
    source = json.dumps(page.read_text()).replace("</", "<\\/")
    probe = probe.replace("WIDTH", str(width)).replace("PAGE", source)
    copy = tmp_path / "copy.html"
    copy.write_text(probe)
    flags = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    command = [*flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)  # type: ignore[list-item]
    found = re.search("<title>(.*?)</title>", done.stdout)
    # A frame with a vertical scroll bar is a little narrower inside.
    assert found, done.stdout[:300] + done.stderr
    measured = re.fullmatch(r"width (\d+) images 4 broken 0 outside 0", found[1])
    assert measured and width - 20 <= int(measured[1]) <= width, found[1]


def test_without_matplotlib(
    model_dir: Path, result: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingError, match=r"loadstone\[report\]"):
        write_report(result, tmp_path)


def test_short_names() -> None:
    assert short_names(["/a/b/x", "/a/c/y"]) == ["x", "y"]
    assert short_names(["/a/b/x", "/a/c/x"]) == ["b/x", "c/x"]
