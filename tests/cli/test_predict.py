"""`predict`, `eval` and `inspect` of contexts fitted on tables, with the model that the package ships."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.tables import write, write_tables
from tests.helpers import run

from loadstone.cli import main


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def fitted(tables: Path) -> dict[str, Path]:
    """Fitted contexts of both tasks, made by the command."""
    made = {}
    for name, target in (("c", "label"), ("r", "y")):
        made[name] = tables / f"{name}-fitted"
        with pytest.raises(SystemExit) as stop:
            main(
                [str(a) for a in ("fit", "--table", tables / f"{name}-train.csv", "--target", target)]
                + ["-o", str(made[name]), "--device", "cpu", "-q"]
            )
        assert not stop.value.code
    return made


def test_eval_and_gates(tables: Path, fitted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "-M", fitted["c"], "--data", tables / "c-test.csv", "--device", "cpu"]
    code, out, _ = run(capsys, *line, "--json", "-", "--fail-if", "accuracy<0.7")
    found = json.loads(out)
    metrics = found["models"][0]["metrics"]
    assert code == 0 and found["gates"][0]["failed"] is False
    assert metrics["accuracy"] > 0.7 and metrics["auc"] > 0.85 and 0 < metrics["log_loss"] < 0.65
    code, out, err = run(capsys, *line, "--fail-if", "log_loss>0.0001")
    assert code == 4 and "log_loss>0.0001 failed" in err and "accuracy" in out
    line = ["eval", "-M", fitted["r"], "--data", tables / "r-test.csv", "--device", "cpu", "--json", "-"]
    code, out, _ = run(capsys, *line)
    metrics = json.loads(out)["models"][0]["metrics"]
    assert code == 0 and metrics["r2"] > 0.4 and 0.5 < metrics["coverage_90"] <= 1 and metrics["rmse"] < 25


def test_predict(
    tables: Path, fitted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, "predict", "-M", fitted["c"], "--data", tables / "c-new.csv", "--device", "cpu"
    )
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and len(rows) == 40 and list(rows[0]) == ["prediction", "p(no)", "p(yes)"]
    assert all(abs(float(r["p(no)"]) + float(r["p(yes)"]) - 1) < 1e-6 for r in rows)
    assert "base: builtin:tiny-pfn" in err
    # The target's column may be there, and changes nothing.
    _, again, _ = run(
        capsys, "predict", "-M", fitted["c"], "--data", tables / "c-test.csv", "--device", "cpu"
    )
    assert again == out
    file = tmp_path / "p.csv"
    line = [
        "predict",
        "-M",
        fitted["r"],
        "--data",
        tables / "r-new.csv",
        "-o",
        file,
        "--quantiles",
        "0.1,0.9",
    ]
    assert run(capsys, *line)[0] == 0
    rows = list(csv.DictReader(file.open()))
    assert list(rows[0]) == ["mean", "std", "q0.1", "q0.9"]
    assert all(float(r["q0.1"]) < float(r["mean"]) < float(r["q0.9"]) for r in rows)
    assert run(capsys, *line)[0] == 2
    code, out, _ = run(capsys, *line[:5], "--json", "-")
    assert code == 0 and len(json.loads(out)["columns"]["mean"]) == 40


def test_inspect(fitted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", fitted["c"], "--json", "--verify")
    found = json.loads(out)
    assert (
        code == 0 and found["kind"] == "context" and found["contains_training_labels"] and found["verified"]
    )
    assert found["base"]["source"] == "builtin:tiny-pfn" and found["base"]["found"] and found["rows"] == 80
    code, out, _ = run(capsys, "inspect", fitted["r"])
    assert code == 0 and "needs base" in out and "builtin:tiny-pfn (here)" in out
    code, out, _ = run(capsys, "inspect", "builtin:tiny-pfn", "--json")
    assert code == 0 and json.loads(out)["kind"] == "pfn"
    script = (
        "import sys; from loadstone.cli import main\n"
        "try: main(['inspect', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(fitted["r"])], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["eval", "-M", "{t}/c-fitted"], 2, "--data"),
        (["eval", "-M", "{t}/c-fitted", "--data", "{t}/c-test.csv", "--kl"], 2, "--kl is about language models"),
        (["eval", "-M", "{t}/c-fitted", "--data", "{t}/c-test.csv", "--json", "{t}"], 2, "is a directory"),
        (["eval", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv"], 2, "no column 'label'"),
        (["eval", "-M", "{t}/c-fitted", "--data", "{t}/c-test.csv", "--fail-if", "ppl>3"], 2, "accuracy"),
        (["eval", "-M", "{t}/c-fitted", "--data", "{t}/r-test.csv"], 3, "lacks 'colour'"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/swapped.csv"], 3, "another order"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/text.csv"], 3, "numeric column 'a'"),
        (["predict", "-M", "{t}", "--data", "{t}/c-new.csv"], 2, "not a fitted context"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv", "--quantiles", "5"], 2, "--quantiles"),
        (["predict", "-M", "{t}/r-fitted", "--data", "{t}/r-new.csv", "--quantiles", ""], 2, "--quantiles"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv", "--quantiles", "0.5"], 2, "no quantiles"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv", "--overwrite"], 2, "without --out"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv", "--json", "{t}"], 2, "is a directory"),
        (["predict", "-M", "{t}/c-fitted", "--data", "{t}/c-new.csv", "--base", "{t}/gone"], 2, "no directory"),
    ],
)  # fmt: skip
def test_wrong_use(
    tables: Path, fitted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    args: list[str], code: int, says: str,
) -> None:  # fmt: skip
    write(tables / "swapped.csv", ["b", "a", "colour"], [[1, 2, "red"]])
    write(tables / "text.csv", ["a", "b", "colour"], [["many", 2, "red"]])
    found, out, err = run(capsys, *(a.format(t=tables, o=tmp_path / "o") for a in args))
    assert (found, out) == (code, "") and says in err
    assert not (tmp_path / "o").exists()


def test_metrics_are_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    import numpy as np

    from loadstone.context.tables.metrics import classification_metrics, regression_metrics

    draw = np.random.default_rng(0)
    for classes in (2, 4):
        probabilities = draw.dirichlet(np.ones(classes), 200).round(2) + 1e-3
        probabilities /= probabilities.sum(1, keepdims=True)
        labels = draw.integers(classes, size=200)
        found = classification_metrics(probabilities, labels)
        assert np.isclose(found["log_loss"], sklearn.log_loss(labels, probabilities))
        score = probabilities[:, 1] if classes == 2 else probabilities
        assert np.isclose(found["auc"], sklearn.roc_auc_score(labels, score, multi_class="ovr"))
        assert found["accuracy"] == sklearn.accuracy_score(labels, probabilities.argmax(1))
    assert classification_metrics(np.ones((3, 1)), np.zeros(3, int))["auc"] is None
    y, mean = draw.normal(size=50), draw.normal(size=50)
    found = regression_metrics(mean, np.zeros(50), np.full(50, 0.5), y)
    assert np.isclose(found["r2"], sklearn.r2_score(y, mean)) and found["coverage_50"] == 1


def test_json_goes_to_the_named_file(
    tables: Path, fitted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.json", tmp_path / "p.csv"
    line = ["predict", "-M", fitted["r"], "--data", tables / "r-new.csv"]
    _, plain, _ = run(capsys, *line)
    code, printed, _ = run(capsys, *line, "--json", file)
    assert (code, printed) == (0, plain) and len(json.loads(file.read_text())["columns"]["mean"]) == 40
    code, printed, _ = run(capsys, *line, "--json", "-", "-o", out)
    assert (code, json.loads(printed)) == (0, json.loads(file.read_text())) and out.read_text() == plain
