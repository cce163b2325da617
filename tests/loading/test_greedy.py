"""`greedy_decoding` writes what transformers' own greedy decoding writes, and leaves the rest to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.small_models import make_model
from transformers import StaticCache

import loadstone
from loadstone.errors import UsageError
from loadstone.loading import greedy

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
PLAIN: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def padded(device: str) -> dict[str, torch.Tensor]:
    """Two sequences of 9 and 5 tokens, padded on the left."""
    ids = torch.randint(1, 400, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def both(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """Tokens by transformers' loop and by ours."""
    expected = model.generate(**inputs, **PLAIN, **options)
    found = model.generate(
        **inputs,
        **PLAIN,
        **options,
        cache_implementation="static",
        custom_generate=loadstone.greedy_decoding,
    )
    return expected.tolist(), found.tolist()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens our loop was asked for, call by call."""
    asked: list[int] = []
    real = greedy._write

    def spy(model: Any, writer: Any, count: int, *rest: Any) -> Any:
        asked.append(count)
        return real(model, writer, count, *rest)

    monkeypatch.setattr(greedy, "_write", spy)
    return asked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_tokens(family: str, device: str, ours: list[int]) -> None:
    model = make_model(family=family).to(device).eval()
    batch = padded(device)
    ids = batch["input_ids"][:1]
    # The second call with a batch size goes through the memory and graph of the first, the last needs more of it.
    for inputs, count in (({"inputs": ids}, 9), ({"inputs": ids[:, :4]}, 1), (batch, 25), (batch, 119)):
        expected, found = both(model, inputs, max_new_tokens=count)
        assert found == expected
    assert ours == [9, 1, 25, 119]


@pytest.mark.parametrize("device", DEVICES)
def test_ends(device: str, ours: list[int]) -> None:
    """Sequences end where transformers ends them, and not before as many tokens as were asked for."""
    model = make_model().to(device).eval()
    batch = padded(device)
    free = model.generate(**batch, **PLAIN, max_new_tokens=40)[:, 9:].tolist()
    early, late = free[0][3], free[1][30]
    options: dict[str, Any] = {"max_new_tokens": 40}
    for ends in (early, [early, late], [free[0][0], free[1][0]], [free[0][20], free[1][17]]):
        for more in ({}, {"min_new_tokens": 5}, {"min_length": 30}, {"min_new_tokens": 40}):
            expected, found = both(model, batch, eos_token_id=ends, **options, **more)
            assert found == expected
    assert len(ours) == 16


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_time": 100.0},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_rest_is_transformers(options: dict[str, Any], ours: list[int]) -> None:
    model = make_model()
    inputs = padded("cpu")
    expected = model.generate(**inputs, **PLAIN, max_new_tokens=5, **options)
    cache = {} if options.get("use_cache") is False else {"cache_implementation": "static"}
    found = model.generate(
        **inputs, **PLAIN, max_new_tokens=5, custom_generate=loadstone.greedy_decoding, **cache, **options
    )
    if options.get("output_scores"):
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores))
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected) and not ours


def test_a_streamer_gets_the_tokens(ours: list[int]) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append("end")

    ids = padded("cpu")["input_ids"][:1]
    model, found, expected = make_model(), Collect(), Collect()
    model.generate(ids, **PLAIN, max_new_tokens=5, streamer=expected)
    both(model, {"inputs": ids}, max_new_tokens=5, streamer=found)
    assert found.seen == 2 * expected.seen and len(expected.seen) == 15 and not ours


def test_decoding_that_is_code_of_the_hub() -> None:
    with pytest.raises(UsageError, match="contrastive search is code that transformers fetches"):
        make_model().generate(
            padded("cpu")["input_ids"],
            **PLAIN,
            penalty_alpha=0.6,
            top_k=4,
            custom_generate=loadstone.greedy_decoding,
        )


def test_other_caches_are_transformers(ours: list[int]) -> None:
    model = make_model()
    ids = padded("cpu")["input_ids"][:1]
    expected = model.generate(ids, **PLAIN, max_new_tokens=5)
    for cache in (None, StaticCache(config=model.config, max_cache_len=20)):
        found = model.generate(
            ids,
            **PLAIN,
            max_new_tokens=5,
            past_key_values=cache,
            custom_generate=loadstone.greedy_decoding,
        )
        assert torch.equal(found, expected)
    # Sliding windows.
    expected, found = both(make_model(family="gemma2", head_dim=8), {"inputs": ids}, max_new_tokens=5)
    assert found == expected and not ours


def test_after_inference_mode() -> None:
    model, ids = make_model(), padded("cpu")["input_ids"][:1]
    with torch.inference_mode():
        both(model, {"inputs": ids}, max_new_tokens=5)
    expected, found = both(model, {"inputs": ids}, max_new_tokens=5)
    assert found == expected


def test_weights_that_moved_are_read_anew() -> None:
    model, ids = make_model(), padded("cpu")["input_ids"][:1]
    both(model, {"inputs": ids}, max_new_tokens=5)
    before = greedy._WRITERS[model]
    both(model, {"inputs": ids}, max_new_tokens=7)
    assert greedy._WRITERS[model] is before
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()
    expected, found = both(model, {"inputs": ids}, max_new_tokens=5)
    assert found == expected and greedy._WRITERS[model] is not before


def test_one_compiled_graph_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer writes its own part of the cache, and none is left compiled."""
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward  # type: ignore[no-any-return]

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    compiled = torch.compile(call, backend=backend, dynamic=False)
    monkeypatch.setattr(greedy, "_compiled_call", lambda: compiled)
    model = make_model(num_hidden_layers=10)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache, use_cache=True)
        expected = model(ids[:, :1], past_key_values=caches[0]).logits
        with greedy._compiled(model.model.layers, caches[1]):
            found = model(ids[:, :1], past_key_values=caches[1]).logits
    assert len(graphs) == 1
    torch.testing.assert_close(found, expected)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("compiles", [True, False])
def test_a_token_is_one_replay(compiles: bool) -> None:
    model = make_model(num_hidden_layers=3).cuda().eval()
    model.generation_config.disable_compile = not compiles
    ids = padded("cuda")["input_ids"][:1]
    expected, found = both(model, {"inputs": ids}, max_new_tokens=40)
    assert found == expected
    writer = greedy._WRITERS[model]
    assert writer.graph is not None
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(
        ids,
        **PLAIN,
        max_new_tokens=40,
        cache_implementation="static",
        custom_generate=loadstone.greedy_decoding,
    )
    assert found.tolist() == expected and len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_a_model_that_asks_the_host_is_called() -> None:
    model = make_model().cuda().eval()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: print(args[0].sum().item()))
    expected, found = both(model, {"inputs": padded("cuda")["input_ids"]}, max_new_tokens=9)
    assert found == expected
    assert greedy._WRITERS[model].graph is not None
