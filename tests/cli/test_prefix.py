"""`finalize --prefix`, and what inspect, eval and predict say to a prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers import run


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("Answer with one word.\n")
    return path


def test_from_prompt_to_scores(
    tiny: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prefix"
    code, printed, _ = run(capsys, "finalize", "-M", tiny, "--prefix", prompt, "--dry-run", "--json")
    plan = json.loads(printed)
    assert code == 0 and plan["dry_run"] and plan["tokens"] == 22 and plan["recipe"] == "none"
    code, printed, _ = run(capsys, "finalize", "-M", tiny, "--prefix", prompt, "-o", out, "--json")
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
    assert run(capsys, "finalize", "-M", tiny, "--prefix", prompt, "-o", out)[0] == 0
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n2,3\n3,4\n4,5\n")
    fitted = tmp_path / "fitted"
    assert run(capsys, "finalize", "--fit", table, "--target", "b", "-o", fitted)[0] == 0
    for arguments, code, said in (
        (("finalize", "-M", tiny, "--prefix", prompt, "-o", out), 2, "exists"),
        (("finalize", "-M", tiny, "--prefix", prompt, "-o", tmp_path / "x", "--skip", "mlp"), 2, "quantizes"),
        (("finalize", "-M", tiny, "--prefix", tmp_path / "none", "-o", tmp_path / "x"), 2, "no file"),
        (("finalize", "-M", tiny, "--prefix", prompt, "-o", tmp_path / "x", "--cache-dtype", "int5"), 2, "int5"),
        (("finalize", "-M", "builtin:tiny-pfn", "--prefix", prompt, "-o", tmp_path / "x"), 2, "language model"),
        (("finalize", "-M", out, "--prefix", prompt, "-o", tmp_path / "x"), 2, "a context"),
        (("finalize", "-M", tiny, "--prefix", prompt, "--fit", table, "-o", tmp_path / "x"), 2, "different contexts"),
        (("predict", "-M", out, "--data", table), 2, "language-model prefix"),
        (("eval", "-M", out, "-M", fitted, "--data", table), 2, "language-model prefix"),
        (("eval", "-M", fitted, "-M", out, "--data", table), 2, "language-model prefix"),
    ):  # fmt: skip
        found, _, err = run(capsys, *arguments)
        assert found == code and said in err, (arguments, err)
    assert not (tmp_path / "x").exists()
