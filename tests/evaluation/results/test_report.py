from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loadstone.errors import MissingError
from loadstone.evaluation.options import Options
from loadstone.evaluation.results.gates import parse_gate
from loadstone.evaluation.results.report import short_names, write_report
from loadstone.evaluation.run import run


def test_page_stands_alone(model_dir: Path, worse_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    models = (str(model_dir), str(worse_dir))
    outcome = run(Options(models, limit=4, divergence=True, gates=(parse_gate("dloss>-1"),)))
    page = write_report(outcome, tmp_path / "new" / "report", "text & <protocol>").read_text()
    assert {p.name for p in (tmp_path / "new" / "report").iterdir()} == {
        "index.html", "size.png", "documents.png", "tokens.png", "kl.png"
    }  # fmt: skip
    assert page.count("data:image/png;base64,") == 4 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "text &amp; &lt;protocol&gt;" in page and "worse" in page and 'class="failed"' in page
    assert f"{outcome.records[1]['delta_loss']:+.4f}" in page


def test_one_model_alone(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(run(Options((str(model_dir),), limit=2)), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "size.png"}


@pytest.mark.slow
def test_opens_in_a_browser(model_dir: Path, worse_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser here")
    options = Options((str(model_dir), str(worse_dir)), limit=25, divergence=True)
    page = write_report(run(options), tmp_path / "report", "text")
    # The page has no script of its own: this one, in a copy, writes down what the browser made of it.
    probe = """<script>addEventListener("load", () => {
      const broken = [...document.images].filter(i => !i.complete || i.naturalWidth < 200).length
      const wide = document.documentElement.scrollWidth - innerWidth
      document.title = `images ${document.images.length} broken ${broken} too wide ${wide > 0}`})</script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", probe + "</body>"))
    assert probe in copy.read_text()
    flags = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    command = [*flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>images 4 broken 0 too wide false</title>" in done.stdout, done.stdout[:300] + done.stderr
    assert "worse" in done.stdout and "±" in done.stdout


def test_without_matplotlib(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingError, match=r"loadstone\[report\]"):
        write_report(run(Options((str(model_dir),), limit=1)), tmp_path)


def test_short_names() -> None:
    assert short_names(["/a/b/x", "/a/c/y"]) == ["x", "y"]
    assert short_names(["/a/b/x", "/a/c/x"]) == ["b/x", "c/x"]
