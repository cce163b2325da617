"""Conversations: the plain loop's loss of the tokens that are scored, and results that know their template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers import run
from tests.small_models import make_model, make_tokenizer, save

import loadstone
from loadstone.errors import UsageError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make(path: Path, template: str | None = TEMPLATE) -> Path:
    tokenizer = make_tokenizer(bos="<begin>")
    tokenizer.chat_template = template
    return save(make_model(vocab_size=len(tokenizer)), tokenizer, path)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("chat") / "m")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "a.jsonl"
    rows = [
        {
            "prompt": "Who ran to the river and back? " * 12,
            "completion": f"The dog ran {n} times." * (1 + n % 3),
        }
        for n in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@torch.no_grad()
def plain_losses(path: Path, pairs: Path) -> np.ndarray:
    """Losses of the answers' tokens, with stock transformers in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    losses = []
    for line in pairs.read_text().splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["prompt"]}]
        talk = [*asked, {"role": "assistant", "content": row["completion"]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answer = tokenizer.apply_chat_template(talk, tokenize=False)[len(text) :]
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + own])
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-float(logits[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])]
    return np.array(losses)


@pytest.mark.parametrize("fast", [True, False])
def test_answers_get_the_plain_loops_losses(chatty: Path, pairs: Path, fast: bool) -> None:
    """All questions are one: with `fast`, it is read once and scored in no document."""
    found = loadstone.evaluate(chatty, data=pairs, chat=True, fast=fast, context_length=400)
    losses = next(iter(found.values.values()))["nll"]
    assert np.allclose(losses, plain_losses(chatty, pairs), atol=2e-5)
    assert (found.protocol["name"], found.protocol["chat"]) == ("rolling", "completions")
    assert "answers alone" in found.description


def test_another_template_is_no_comparison(chatty: Path, pairs: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", TEMPLATE.replace("[end]", "<end>"))
    with pytest.raises(UsageError, match="render the conversations differently"):
        loadstone.evaluate([chatty, other], data=pairs, chat=True)
    same = make(tmp_path / "same", "{# the same text #}" + TEMPLATE)
    assert len(loadstone.evaluate([chatty, same], data=pairs, chat=True).records) == 2
    # Plain text does not ask for the template.
    loadstone.evaluate([chatty, other], data=pairs, text_column="completion")


def test_stored_scores_know_the_template(pairs: Path, tmp_path: Path) -> None:
    path, cache = make(tmp_path / "m"), tmp_path / "cache"
    first = loadstone.evaluate(path, data=pairs, chat=True, cache=cache)
    assert loadstone.evaluate(path, data=pairs, chat=True, cache=cache).records[0]["cached"]
    tokenizer = make_tokenizer(bos="<begin>")
    tokenizer.chat_template = TEMPLATE.replace("[user]", "[asks]").replace("m.role", "m.role | upper")
    tokenizer.save_pretrained(path)
    second = loadstone.evaluate(path, data=pairs, chat=True, cache=cache)
    assert not second.records[0]["cached"]
    assert first.records[0]["loss"] != second.records[0]["loss"]


def test_the_command(chatty: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "eval", "-M", chatty, "--data", pairs, "--chat", "--protocol", "packed")
    assert code == 0
    assert "answers alone are scored, in the chat template; packed windows" in out
    plain = make(tmp_path / "plain", None)
    code, _, err = run(capsys, "eval", "-M", plain, "--data", pairs, "--chat")
    assert code == 2
    assert "no chat template" in err
    code, _, err = run(capsys, "eval", "-M", chatty, "--data", "sample", "--chat")
    assert code == 2
    assert "holds text" in err
