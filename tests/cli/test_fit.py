"""`loadstone fit` on tables and prompts, and what inspect, eval and predict say to a prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.tables import write_tables
from tests.helpers import run

import loadstone


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("Answer with one word.\n")
    return path


def test_from_prompt_to_scores(
    tiny: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prefix"
    code, printed, _ = run(capsys, "fit", "-M", tiny, "--prompt", prompt, "--dry-run", "--json", "-")
    plan = json.loads(printed)
    assert code == 0 and plan["dry_run"] and plan["tokens"] == 22 and plan["recipe"] == "none"
    code, printed, _ = run(capsys, "fit", "-M", tiny, "--prompt", prompt, "-o", out, "--json", "-")
    done = json.loads(printed)
    assert code == 0 and done["bytes"] == plan["predicted_bytes"] and done["dtype"] == "float32"
    code, printed, _ = run(capsys, "inspect", out, "--verify", "--json")
    found = json.loads(printed)
    assert code == 0 and found["context_kind"] == "llm-prefix" and found["verified"]
    assert found["prompt"]["tokens"] == 22 and found["base"]["found"] and found["layers"] == {"full": 2}
    code, printed, _ = run(capsys, "inspect", out)
    assert "needs tokenizer" in printed and "Answer with one word." in printed
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Paris"}\n{"text": "Rome"}\n')
    code, printed, err = run(capsys, "eval", "-M", out, "--data", text, "--device", "cpu", "--json", "-")
    result = json.loads(printed)
    assert code == 0, err
    assert result["protocol"]["prefix_tokens"] == 22 and result["models"][0]["kind"] == "context"
    assert result["protocol"]["tokens"] == 9


def test_refusals(tiny: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prefix"
    assert run(capsys, "fit", "-M", tiny, "--prompt", prompt, "-o", out)[0] == 0
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n2,3\n3,4\n4,5\n")
    fitted = tmp_path / "fitted"
    assert run(capsys, "fit", "--table", table, "--target", "b", "-o", fitted)[0] == 0
    for arguments, code, said in (
        (("fit", "-M", tiny, "--prompt", prompt, "-o", out), 2, "exists"),
        (("fit", "-M", tiny, "--prompt", tmp_path / "none", "-o", tmp_path / "x"), 2, "no file"),
        (("fit", "-M", tiny, "--prompt", prompt, "-o", tmp_path / "x", "--cache-dtype", "int5"), 2, "int5"),
        (("fit", "-M", "builtin:tiny-pfn", "--prompt", prompt, "-o", tmp_path / "x"), 2, "language model"),
        (("fit", "-M", out, "--prompt", prompt, "-o", tmp_path / "x"), 2, "a context"),
        (("fit", "-M", tiny, "--prompt", prompt, "--table", table, "-o", tmp_path / "x"), 2, "one of them"),
        (("predict", "-M", out, "--data", table), 2, "language-model prefix"),
        (("eval", "-M", out, "-M", fitted, "--data", table), 2, "language-model prefix"),
        (("eval", "-M", fitted, "-M", out, "--data", table), 2, "language-model prefix"),
    ):  # fmt: skip
        found, _, err = run(capsys, *arguments)
        assert found == code and said in err, (arguments, err)
    assert not (tmp_path / "x").exists()


def test_dry_run_predicts_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = write_tables(tmp_path)
    for name, target in (("c", "label"), ("r", "y")):
        out = tmp_path / name
        line = ["fit", "--table", tables / f"{name}-train.csv", "--target", target, "-o", out, "--json", "-"]
        code, printed, _ = run(capsys, *line, "--dry-run")
        plan = json.loads(printed)
        assert code == 0 and plan["dry_run"] and plan["file_bytes"] is None and not out.exists()
        assert plan["categorical"] == (["colour"] if name == "c" else [])
        code, printed, _ = run(capsys, *line)
        done = json.loads(printed)
        assert code == 0 and done["file_bytes"] == sum(path.stat().st_size for path in out.iterdir())
        assert plan["predicted_bytes"] == done["predicted_bytes"]
        assert abs(plan["predicted_bytes"] / (out / "context.safetensors").stat().st_size - 1) < 0.01


def test_the_library_does_what_the_command_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = write_tables(tmp_path)
    file = tmp_path / "fit.json"
    line = ["fit", "--table", tables / "c-train.csv", "--target", "label", "--device", "cpu", "--json", file]
    code, printed, _ = run(capsys, *line, "-o", tmp_path / "by-command")
    assert code == 0 and "task" in printed and "by-command" in printed
    result = loadstone.fit(
        "builtin:tiny-pfn",
        tmp_path / "by-library",
        table=tables / "c-train.csv",
        target="label",
        device="cpu",
    )
    said = json.loads(file.read_text())
    for key, value in result.to_json().items():
        assert key in ("out", "seconds") or said[key] == value, key
    tensors = [
        (tmp_path / name / "context.safetensors").read_bytes() for name in ("by-command", "by-library")
    ]
    assert tensors[0] == tensors[1]
    found = loadstone.predict(tmp_path / "by-library", tables / "c-new.csv", device="cpu")
    assert found.task == "classification" and found.rows == 40 and found.targets is None


TABLE = ["fit", "--table", "{t}/c-train.csv", "--target", "label", "-o", "{o}"]
PROMPT = ["fit", "-M", "builtin:tiny-llama", "--prompt", "{t}/prompt.txt", "-o", "{o}"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fit", "-o", "{o}"], "--table FILE"),
        (["fit", "--table", "{t}/c-train.csv", "--target", "label"], "-o OUT"),
        (["fit", "--table", "{t}/c-train.csv", "-o", "{o}"], "--target"),
        (["fit", "--table", "{t}/c-train.csv", "--target", "lable", "-o", "{o}"], "Did you mean 'label'"),
        (["fit", "--table", "{t}/none.csv", "--target", "label", "-o", "{o}"], "no file"),
        (["fit", "--table", "{t}/c-train.csv", "--target", "label", "-o", "{t}/kept", "--overwrite"], "not a fitted"),
        (["fit", "--table", "{t}/c-train.csv", "--target", "label", "-o", "{t}", "--overwrite"], "overlap"),
        ([*TABLE, "--task", "regression"], "not a number"),
        ([*TABLE, "--task", "ranking"], "--task ranking"),
        ([*TABLE, "--cache-dtype", "fp8"], "int8"),
        ([*TABLE, "-M", "builtin:x"], "tiny-pfn"),
        ([*TABLE, "-M", "builtin:tiny-llama"], "in-context model"),
        ([*TABLE, "--dtype", "bfloat16"], "--dtype has no meaning with --table"),
        ([*TABLE, "--checkpoint", "best"], "--checkpoint has no meaning"),
        ([*TABLE, "--trust-remote-code"], "--trust-remote-code has no meaning"),
        ([*TABLE, "--prompt", "{t}/prompt.txt"], "one of them"),
        ([*TABLE, "--json", "{t}"], "is a directory"),
        ([*PROMPT, "--target", "label"], "--target has no meaning with --prompt"),
        ([*PROMPT, "--task", "regression"], "--task has no meaning"),
        ([*PROMPT, "--dtype", "int8"], "--dtype int8"),
        (["fit", "--prompt", "{t}/prompt.txt", "-o", "{o}"], "-M DIR"),
    ],
)  # fmt: skip
def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    tables = write_tables(tmp_path)
    (tables / "prompt.txt").write_text("Answer with one word.")
    (tables / "kept").mkdir()
    code, out, err = run(capsys, *(a.format(t=tables, o=tmp_path / "o") for a in args))
    assert (code, out) == (2, "") and says in err
    assert not (tmp_path / "o").exists() and (tables / "kept").exists()


@pytest.mark.parametrize(
    "args",
    [
        "--fit t.csv --target y --verify --algorithm gptq --calibrate none.txt --recipe none.yaml "
        "--max-shard-size nonsense",
        "-M builtin:tiny-llama --prefix prompt.txt",
        "-M builtin:tiny-llama --target y",
        "-M builtin:tiny-llama --task regression",
        "-M builtin:tiny-llama --cache-dtype int8",
    ],
)
def test_finalize_fits_nothing(
    args: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("x,y\n1,2\n2,3\n3,4\n")
    Path("prompt.txt").write_text("Answer with one word.")
    code, out, err = run(capsys, "finalize", *args.split(), "-o", "z")
    assert (code, out) == (2, "") and "loadstone fit" in err
    assert not Path("z").exists()
