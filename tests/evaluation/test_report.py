from __future__ import annotations

import re
from pathlib import Path

import pytest

from loadstone.errors import MissingError
from loadstone.evaluation.gates import parse_gate
from loadstone.evaluation.options import Options
from loadstone.evaluation.report import short_names, write_report
from loadstone.evaluation.run import evaluate


def test_page_stands_alone(model_dir: Path, worse_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    models = (str(model_dir), str(worse_dir))
    outcome = evaluate(Options(models, limit=4, divergence=True, gates=(parse_gate("dloss>-1"),)))
    page = write_report(outcome, tmp_path / "new" / "report", "text & <protocol>").read_text()
    assert {p.name for p in (tmp_path / "new" / "report").iterdir()} == {
        "index.html", "size.png", "documents.png", "tokens.png", "kl.png"
    }  # fmt: skip
    assert page.count("data:image/png;base64,") == 4 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "text &amp; &lt;protocol&gt;" in page and "worse" in page and 'class="failed"' in page
    assert f"{outcome.records[1]['delta_loss']:+.4f}" in page


def test_one_model_alone(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(evaluate(Options((str(model_dir),), limit=2)), tmp_path, "x")
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "size.png"}


def test_without_matplotlib(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingError, match=r"loadstone\[report\]"):
        write_report(evaluate(Options((str(model_dir),), limit=1)), tmp_path, "x")


def test_short_names() -> None:
    assert short_names(["/a/b/x", "/a/c/y"]) == ["x", "y"]
    assert short_names(["/a/b/x", "/a/c/x"]) == ["b/x", "c/x"]
