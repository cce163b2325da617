"""`PrefixCache.read` gives what the model gives after a fork, and a fork to go on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.context.prefix.test_prefix import FAMILIES, P, build

from loadstone.context.prefix.fit import make_prefix
from loadstone.context.prefix.reading import Reader
from loadstone.errors import UsageError

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
PADDED = ("gpt2", "llama", "moe", "qwen3")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read on a CPU as on a GPU: padded, by the function that is captured there."""
    monkeypatch.setattr(Reader, "captures", lambda self, tokens: self._alike and tokens <= 64, raising=True)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("share", [True, False])
def test_reads_as_the_model_does(name: str, device: str, share: bool, always: None) -> None:
    model = build(name).to(device)
    ids = torch.randint(3, 256, (2, P + 30), generator=torch.Generator().manual_seed(1)).to(device)
    cache = make_prefix(model, ids[:1, :P], share=share)
    for rows, length in ((1, 9), (2, 30), (1, 1), (2, 17), (1, 9), (1, 12)):
        own, more = ids[:rows, P : P + length], ids[:rows, :3]
        plain = cache.fork(batch=rows)
        expected = model(own, past_key_values=plain).logits[:, -1]
        after = model(more, past_key_values=plain).logits
        found, fork = cache.read(own)
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)
        assert fork.get_seq_length() == P + length and cache.get_seq_length() == P
        torch.testing.assert_close(model(more, past_key_values=fork).logits, after, rtol=0, atol=2e-5 * scale)
    assert cache._reader is not None and bool(cache._reader._captured._graphs) == (
        device == "cuda" and name in PADDED
    )


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_used_where_nothing_sees_it(
    name: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    real = Reader._padded

    def spy(self: Reader, ids: torch.Tensor, last: torch.Tensor) -> Any:
        widths.append(ids.shape[1])
        return real(self, ids, last)

    monkeypatch.setattr(Reader, "_padded", spy)
    ids = torch.arange(3, 123)[None]
    cache = make_prefix(build(name), ids[:, :P])
    # Positions after the model's last one are not padded into, and many tokens are not padded.
    for length in (1, 16, 17, 40, 70):
        cache.read(ids[:, P : P + length])
    long = make_prefix(cache.model, torch.randint(3, 256, (1, 250)))
    long.read(ids[:, :5])
    assert widths == [16, 16, 32, 64]


def test_refuses() -> None:
    cache = make_prefix(build("llama"), torch.arange(3, 13)[None])
    for ids in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(UsageError, match="shape"):
            cache.read(ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_has_the_bits_of_the_padded_call(dtype: torch.dtype) -> None:
    model = build("llama").to("cuda", dtype)
    ids = torch.randint(3, 256, (1, P + 24), device="cuda")
    cache = make_prefix(model, ids[:, :P])
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    results = [cache.read(ids[:, P:])[0] for _ in range(4)]
    assert all(torch.equal(result, results[0]) for result in results)
    # Once plainly, once before the capture and once for it.
    assert len(calls) == 3
    assert torch.equal(cache.read(ids[:, P:-3])[0], cache.read(ids[:, P:-3])[0])
    assert len(calls) == 3
