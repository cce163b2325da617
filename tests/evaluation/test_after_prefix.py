"""`eval -M prefix/`: text and tasks after a prompt, against the prompt in every request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.small_models import make_model, make_tokenizer, save

import loadstone
from loadstone.context.prefix.base import language_artifact, load_language_model
from loadstone.context.prefix.fit import encode_prompt, make_prefix
from loadstone.context.prefix.store import save_prefix
from loadstone.errors import UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run

PROMPT = "It is a truth universally acknowledged, that a single man"
TEXTS = ["in possession of a good fortune", "must be in want of a wife. " * 12, "x"]


def make(directory: Path, out: Path, prompt: str = PROMPT, kind: str | None = None) -> Path:
    artifact = language_artifact(directory)
    model, tokenizer = load_language_model(artifact, device="cpu", dtype="float32")
    tokens, text, template = encode_prompt(prompt, tokenizer)
    cache = make_prefix(
        model, tokens, cache_kind=kind, text=text, template=template, tokenizer=tokenizer, share=False
    )
    return save_prefix(cache, out, source=artifact)


@pytest.fixture(scope="module")
def prefix(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(model_dir, tmp_path_factory.mktemp("prefix") / "prefix")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


def test_losses_are_those_of_the_whole_text(
    prefix: Path, data: Path, model: Any, tokenizer: Any, model_dir: Path
) -> None:
    outcome = run(Options(models=(str(prefix),), data=str(data), device="cpu"))
    (values,) = outcome.values.values()
    start = tokenizer(PROMPT)["input_ids"]
    protocol = outcome.task.protocol
    assert (protocol.prefix_tokens, protocol.name) == (len(start), "rolling")
    assert protocol.context_length == 128 - (len(start) - 1)
    expected = []
    for text in TEXTS:
        own = tokenizer(text)["input_ids"]
        for at, stop in _windows(len(own), protocol.context_length):
            begin = max(0, stop - protocol.context_length)
            ids = torch.tensor([start + own[begin:stop]])
            with torch.no_grad():
                nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            expected += nll[-(stop - at) :].tolist()
    assert len(values["nll"]) == len(expected)
    assert abs(values["nll"] - torch.tensor(expected).numpy()).max() < 2e-5
    assert outcome.records[0]["kind"] == "context"


def _windows(count: int, context: int) -> list[tuple[int, int]]:
    return [(at, min(at + context, count)) for at in range(0, count, context)]


def test_quantized_caches_compare_with_plain_ones(
    prefix: Path, data: Path, model_dir: Path, tmp_path: Path
) -> None:
    rough = make(model_dir, tmp_path / "int8", kind="int8")
    outcome = run(
        Options(models=(str(rough),), baseline=str(prefix), data=str(data), device="cpu", divergence=True)
    )
    record = outcome.records[1]
    assert 0 < abs(record["delta_loss"]) < 0.02
    assert 0 < record["kl"] < 0.02 if "kl" in record else True


def test_scores_are_cached_by_prefix(prefix: Path, data: Path, model_dir: Path, tmp_path: Path) -> None:
    other = make(model_dir, tmp_path / "other", prompt="Another prompt altogether")
    store = str(tmp_path / "store")
    losses = []
    for path, cached in ((prefix, False), (other, False), (prefix, True), (model_dir, False)):
        outcome = run(
            Options(models=(str(path),), data=str(data), device="cpu", cache=store, protocol="rolling")
        )
        assert outcome.records[0]["cached"] == cached
        losses.append(outcome.records[0]["loss"])
    assert losses[0] == losses[2] and len({*losses}) == 3


def test_what_does_not_fit_together_is_refused(
    prefix: Path, data: Path, model_dir: Path, tmp_path: Path
) -> None:
    other = make(model_dir, tmp_path / "other", prompt="Another prompt altogether")
    for options, said in (
        ({"models": (str(prefix), str(model_dir))}, "see different contexts"),
        ({"models": (str(prefix), str(other))}, "different prompts"),
        ({"models": (str(prefix),), "dtype": "bfloat16"}, "was made in float32"),
        ({"models": (str(prefix),), "speed": True}, "--speed has no meaning"),
        ({"models": (str(prefix),), "protocol": "strided"}, "scored alone"),
    ):
        with pytest.raises(UsageError, match=said):
            run(Options(**{"data": str(data), "device": "cpu", **options}))  # type: ignore[arg-type]


def test_tasks_after_a_prefix(
    model_factory: Callable[..., Any], tokenizer_factory: Callable[..., Any]
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from loadstone.evaluation.harness.sharing_lm import SharingLM
    from loadstone.evaluation.scoring.head import PrefixedModel

    model, tokenizer = model_factory(max_position_embeddings=512), tokenizer_factory()
    tokenizer.pad_token = tokenizer.eos_token
    # Ends in a space of its own, so that tokens of prompt and question are those of both together.
    prompt = "It is a truth universally acknowledged.\n\n"
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    after = SharingLM(PrefixedModel(model, make_prefix(model, tokens)), tokenizer, batch_size=3)
    whole = SharingLM(model, tokenizer, batch_size=3, share=False)
    contexts = ["Q: one?\nA:", "Q: number two?\nA:", "Q: three\nA:", ""]
    pairs = [(c, t) for c in contexts for t in (" yes", " no, never")]

    def ask(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    found = after.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    expected = whole.loglikelihood(
        ask("loglikelihood", [(prompt + c, t) for c, t in pairs]), disable_tqdm=True
    )
    for (a, same_a), (b, same_b), (context, _) in zip(found, expected, pairs, strict=True):
        if context:
            assert abs(a - b) < 2e-5 and same_a == same_b
    generation = {"until": ["\n\n"], "max_gen_toks": 6}
    found = after.generate_until(
        ask("generate_until", [(c, generation) for c in contexts[:3]]), disable_tqdm=True
    )
    expected = whole.generate_until(
        ask("generate_until", [(prompt + c, generation) for c in contexts[:3]]), disable_tqdm=True
    )
    assert found == expected


def test_windows_beyond_what_the_model_was_made_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a prefix too, with one warning and the plain loop's losses."""
    tokenizer = make_tokenizer()
    base = save(
        make_model(max_position_embeddings=64, vocab_size=len(tokenizer)), tokenizer, tmp_path / "base"
    )
    (tmp_path / "prompt.txt").write_text("The dog ran to the river. " * 3)
    (tmp_path / "text.txt").write_text("The cat sat by the tree and saw the dog. " * 6)
    loadstone.fit(base, tmp_path / "prefix", prompt=tmp_path / "prompt.txt")
    caplog.clear()
    found = loadstone.evaluate(tmp_path / "prefix", data=tmp_path / "text.txt", context_length=200)
    assert sum("more than the 64 positions" in r.message for r in caplog.records) == 1
    start = tokenizer(str((tmp_path / "prompt.txt").read_text()))["input_ids"]
    own = tokenizer((tmp_path / "text.txt").read_text().strip("\n"))["input_ids"]
    model = loadstone.load(base, dtype="float32")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + own]), use_cache=False).logits[0].log_softmax(-1)
    expected = [-float(logits[len(start) - 1 + at, token]) for at, token in enumerate(own)]
    assert len(start) + len(own) > 64
    assert np.allclose(next(iter(found.values.values()))["nll"], expected, atol=2e-5)
