from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.errors import ArtifactError
from loadstone.evaluation.scoring.head import split_head
from loadstone.evaluation.scoring.losses import BatchMaker, Timing, Values, plan_batches, score, token_losses
from loadstone.text.corpus import Corpus, read_corpus
from loadstone.text.stream import TokenStream
from loadstone.text.tokenizing import tokenize
from loadstone.text.tokens import PROTOCOLS, make_protocol, make_windows

CPU = torch.device("cpu")


def reference_losses(model: Any, stream: TokenStream, protocol: Any) -> np.ndarray:
    """A plain loop, one window at a time, in float64: what every faster path must agree with."""
    if not getattr(model.config, "num_experts", None):  # grouped expert products know no float64
        model = copy.deepcopy(model).double()
    windows = make_windows(stream, protocol)
    losses = np.full(len(stream.ids), np.nan)
    for start, length, first in zip(windows.start, windows.length, windows.first, strict=True):
        ids = torch.from_numpy(stream.ids[start : start + length])[None]
        if protocol.bos_each_window:
            ids = ids.clone()
            ids[0, 0] = protocol.separator_id
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(first, start + length + 1):
            if stream.document[position] >= 0:
                assert math.isnan(losses[position])
                losses[position] = -log_p[position - 1 - start, stream.ids[position]]
    return losses[stream.scored]


def run(model: Any, stream: TokenStream, protocol: Any, batch_size: int = 4, **options: Any) -> np.ndarray:
    return run_timed(model, stream, protocol, batch_size, **options)[0]["nll"]


def run_timed(
    model: Any, stream: TokenStream, protocol: Any, batch_size: int, **options: Any
) -> tuple[Values, Timing]:
    windows = make_windows(stream, protocol)
    maker = BatchMaker(stream, protocol, windows, CPU)
    return score(model, maker, plan_batches(windows, batch_size), name="m", **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "qwen3_moe"])
def test_agrees_with_a_float64_loop(model_factory: Any, tokenizer: Any, family: str) -> None:
    changes = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 5.0}}.get(family, {})
    model = model_factory(family=family, **changes)
    stream = tokenize(read_corpus(limit=2), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128, context_length=96)
    expected = reference_losses(model, stream, protocol)
    nll = run(model, stream, protocol)
    assert not split_head(model).whole
    assert nll.dtype == np.float32 and len(nll) == protocol.tokens
    assert np.abs(nll - expected).max() < 1e-4
    assert abs(nll.astype(np.float64).mean() - expected.mean()) < 1e-6
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_protocol_agrees_with_the_loop(
    model: Any, bos_tokenizer: Any, name: str, batch_size: int
) -> None:
    documents = read_corpus(limit=3).documents
    corpus = Corpus("x", (documents[0], "A short one.", documents[1][:700]), "0")
    stream = tokenize(corpus, bos_tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128, context_length=48, name=name)
    expected = reference_losses(model, stream, protocol)
    assert np.abs(run(model, stream, protocol, batch_size) - expected).max() < 1e-4


def test_context_matters(model: Any, tokenizer: Any) -> None:
    """The protocols score the same tokens with different contexts: their losses must not coincide."""
    stream = tokenize(read_corpus(limit=2), tokenizer)
    losses = [
        run(model, stream, make_protocol(stream, dtype="f", longest=128, context_length=32, name=name))
        for name in PROTOCOLS
    ]
    assert len({len(nll) for nll in losses}) == 1
    assert np.abs(losses[0] - losses[1]).max() > 1e-3 and np.abs(losses[0] - losses[2]).max() > 1e-3


def test_head_chunks_change_nothing(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tokenize(read_corpus(limit=1), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    whole = run(model, stream, protocol)
    shapes = []
    monkeypatch.setattr(
        "loadstone.evaluation.scoring.losses.token_losses",
        lambda logits, targets: (shapes.append(len(logits)), token_losses(logits, targets))[1],
    )
    monkeypatch.setattr("loadstone.evaluation.scoring.losses.chunk_rows", lambda model, device: 7)
    assert np.abs(run(model, stream, protocol) - whole).max() < 1e-5
    assert max(shapes) == 7


@pytest.mark.parametrize("vocabulary", [4096, 32_000, 49_152, 128_256, 262_144])
def test_losses_over_large_vocabularies(vocabulary: int) -> None:
    """Float32 losses against float64: 1e-6 in the mean and one rounding of each value, at any size and offset."""
    torch.manual_seed(0)
    logits = 10 + 4 * torch.randn((1 << 23) // vocabulary, vocabulary)
    targets = torch.randint(vocabulary, (len(logits),))
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    apart = token_losses(logits, targets).double() - expected
    assert apart.mean().abs() < 3e-7 and apart.abs().max() < 3e-6
    assert torch.allclose(token_losses(logits.double(), targets), expected, rtol=1e-14, atol=0)
    assert torch.equal(
        token_losses(logits.bfloat16(), targets), token_losses(logits.bfloat16().float(), targets)
    )


def test_a_model_that_cannot_be_divided_is_scored_whole(model: Any, tokenizer: Any) -> None:
    class Shifted(torch.nn.Module):
        """Adds to the base model's hidden state outside the base model's forward: the probe must notice."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.base_model, self.config = model, model.model, model.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            output = self.inner(input_ids=input_ids, use_cache=use_cache)
            output.logits = output.logits + 0.1 * input_ids[..., None].float() * torch.arange(400) / 400
            return output

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return self.inner.get_output_embeddings()

    shifted = Shifted().eval()
    assert split_head(shifted).whole
    stream = tokenize(read_corpus(limit=1), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128, context_length=64)
    expected = reference_losses(shifted, stream, protocol)
    assert np.abs(run(shifted, stream, protocol) - expected).max() < 1e-4


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    before = dict(model.model.__dict__)
    stream = tokenize(read_corpus(limit=1), tokenizer)
    run(model, stream, make_protocol(stream, dtype="float32", longest=128))
    assert model.model.__dict__ == before


def test_non_finite_losses_name_the_model(model_factory: Any, tokenizer: Any) -> None:
    model = model_factory()
    stream = tokenize(read_corpus(limit=1), tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ArtifactError, match="'m' gives losses that are not finite"):
        run(model, stream, make_protocol(stream, dtype="float32", longest=128))


def test_ranks_share_the_same_batches(model: Any, tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=3), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    whole = run(model, stream, protocol, 3)
    a, b = (run(model, stream, protocol, 3, share=(rank, 2)) for rank in range(2))
    assert (np.isnan(a) != np.isnan(b)).all()
    assert np.array_equal(np.where(np.isnan(a), b, a), whole)


@pytest.mark.parametrize("stop_after", [1, 2, 5, 9, 12])
def test_an_interrupted_run_goes_on_to_the_same_bits(model: Any, tokenizer: Any, stop_after: int) -> None:
    stream = tokenize(read_corpus(limit=6), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    whole = run(model, stream, protocol, 2)
    saved: list[Values] = []
    steps: list[int] = []

    def stop(step: int) -> None:
        steps.append(step)
        if len(steps) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, stream, protocol, 2, progress=stop, save=saved.append)
    assert np.isfinite(saved[-1]["nll"]).sum() == sum(steps)
    values, timing = run_timed(model, stream, protocol, 2, values=saved[-1])
    assert np.array_equal(values["nll"], whole)
    assert timing.tokens == protocol.tokens - sum(steps)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_fixed_shapes_change_nothing_but_the_shapes(model: Any, tokenizer: Any, name: str) -> None:
    stream = tokenize(read_corpus(limit=7), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128, context_length=100, name=name)
    windows = make_windows(stream, protocol)
    expected = run(model, stream, protocol, 3)
    maker = BatchMaker(stream, protocol, windows, CPU)
    maker.rows = 3
    batches = plan_batches(windows, 3)
    assert {tuple(maker(members).ids.shape) for members in batches} <= {(3, 64), (3, 100)}
    got = score(model, maker, batches, name="m")[0]["nll"]
    assert np.abs(got - expected).max() < 1e-4


def test_batches_hold_every_window_once_and_little_padding(tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=20), tokenizer)
    windows = make_windows(
        stream, make_protocol(stream, dtype="f", longest=1000, name="rolling", context_length=1000)
    )
    batches = plan_batches(windows, 4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(windows)))
    assert max(map(len, batches)) == 4
    for members in batches:
        lengths = windows.length[members]
        assert lengths[0] == lengths.max() <= 1.25 * lengths.min()
