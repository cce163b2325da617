"""Prefixes on a CUDA device: the kernels that attention is shared with there, and both device pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu


def _model(dtype: torch.dtype, device: str = "cuda") -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(device, dtype).eval()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)]
)
def test_attention_is_shared_and_exact(dtype: torch.dtype, tolerance: float) -> None:
    from loadstone.context.prefix.fit import make_prefix

    model = _model(dtype)
    ids = torch.randint(0, 256, (5, 300), device="cuda")
    ids[:, :200] = ids[0, :200]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 200:].double()
        cache = make_prefix(model, ids[:1, :200])
        assert cache.shares
        fork = cache.fork(batch=5)
        parts = [
            model(input_ids=ids[:, a:b], past_key_values=fork).logits
            for a, b in ((200, 260), (260, 261), (261, 300))
        ]
    apart = (torch.cat(parts, 1).double() - expected).abs().max() / expected.abs().max()
    assert apart.item() <= tolerance


def test_left_padding(tmp_path: Path) -> None:
    from loadstone.context.prefix.fit import make_prefix

    model = _model(torch.float32)
    # 0 is the padding token: without a mask, `generate` would take it for padding.
    ids = torch.randint(1, 256, (2, 80), device="cuda")
    ids[1, :50] = ids[0, :50]
    cache = make_prefix(model, ids[:1, :50])
    mask = torch.ones_like(ids)
    mask[1, 50:62] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache.fork(batch=2), **options)
    alone = torch.cat([ids[1:, :50], ids[1:, 62:]], 1)
    assert found[1, 80:].tolist() == model.generate(input_ids=alone, **options)[0, 68:].tolist()
    assert found[0, 80:].tolist() == model.generate(input_ids=ids[:1], **options)[0, 80:].tolist()


@pytest.mark.parametrize("made, used", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_prefixes_travel_between_devices(made: str, used: str, kind: str | None, tmp_path: Path) -> None:
    import loadstone
    from loadstone.context.prefix.fit import make_prefix
    from loadstone.context.prefix.store import save_prefix

    tokens = torch.randint(0, 256, (1, 64))
    cache = make_prefix(_model(torch.float32, made), tokens, cache_kind=kind)
    save_prefix(cache, tmp_path / "prefix")
    # Random numbers are drawn on the CPU, so both devices have the same weights.
    found = loadstone.load_context(tmp_path / "prefix", _model(torch.float32, used))
    more = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        a = cache.model(input_ids=more.to(made), past_key_values=cache.fork(batch=2)).logits.cpu()
        b = found.model(input_ids=more.to(used), past_key_values=found.fork(batch=2)).logits.cpu()
    assert ((a - b).abs().max() / a.abs().max()).item() <= (1e-5 if made == used else 5e-3)
