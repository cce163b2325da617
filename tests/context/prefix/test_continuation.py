"""A prefix continues as one pass would, or the model's class is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.context.prefix.test_prefix import _SIZES

from loadstone.context.prefix import continuation
from loadstone.context.prefix.fit import make_prefix
from loadstone.context.prefix.store import save_prefix
from loadstone.errors import ArtifactError, UsageError

_IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests found of an architecture is no answer for models with hooks."""
    monkeypatch.setattr(continuation, "_FOUND", {})


def _model(stem: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**_SIZES | options)
    return getattr(transformers, f"{stem}ForCausalLM")(config).eval()


def test_a_scan_that_starts_anew_is_refused() -> None:
    # Jamba's scan ignores its state when several tokens follow it.
    model = _model(
        "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(ArtifactError, match="does not continue after a prefix as in one pass"):
            make_prefix(model, _IDS)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 12}])
def test_the_stored_probe_is_the_uncached_answer(options: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = _model("Mistral", **options)
    save_prefix(make_prefix(model, _IDS), tmp_path / "prefix")
    stored = load_file(tmp_path / "prefix" / "context.safetensors")["probe.logits"]
    with torch.no_grad():
        ids = torch.cat([_IDS, _IDS[:, :1]], 1)
        assert torch.equal(stored, model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1])


def test_noise_of_rounding_is_no_error() -> None:
    model = _model("Llama")

    def rounded(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = args[0].abs().amax(-1, keepdim=True) / 7
        return ((args[0] / scale).round() * scale,)

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(rounded)
    make_prefix(model, _IDS)


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 48,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "length", "request_", "works"),
    [
        (_LONGROPE, 30, 10, True),
        (_LONGROPE, 30, 30, False),  # crosses
        (_LONGROPE, 60, 30, True),  # all of it long
        (_DYNAMIC, 30, 30, True),
        (_DYNAMIC, 30, 40, False),
    ],
)
def test_requests_keep_the_frequencies_of_their_prefix(
    rope: dict[str, Any], length: int, request_: int, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.context.prefix import fit

    monkeypatch.setattr(fit, "_CHUNK", {"cpu": 16, "cuda": 16})
    sizes = {"num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 64, "rope_parameters": rope}
    if rope is _LONGROPE:
        sizes["max_position_embeddings"] = 256
    model = _model("Llama", **sizes)
    ids = torch.arange(2, 2 + length + request_)[None]
    cache = make_prefix(model, ids[:, :length])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, length:]
        if works:
            found = model(input_ids=ids[:, length:], past_key_values=cache.fork(), use_cache=True).logits
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        else:
            with pytest.raises(UsageError, match="rotary frequencies change"):
                model(input_ids=ids[:, length:], past_key_values=cache.fork(), use_cache=True)


def test_a_prefix_longer_than_the_model_was_made_for() -> None:
    ids = torch.arange(2, 92)[None]
    model = _model("Llama", max_position_embeddings=64)
    cache = make_prefix(model, ids[:, :70])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, 70:]
        found = model(input_ids=ids[:, 70:], past_key_values=cache.fork(), use_cache=True).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(UsageError, match="70 tokens and the model 64 positions"):
        make_prefix(_model("GPTBigCode", max_position_embeddings=64), ids[:, :70])
    dynamic = _model("Llama", max_position_embeddings=64, rope_parameters=_DYNAMIC)
    with pytest.raises(UsageError, match="rotary frequencies change"):
        make_prefix(dynamic, ids[:, :70])


def test_what_was_compared_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And compared again where other libraries would continue."""
    from loadstone.artifact.context_file import read_context
    from loadstone.context.prefix import store

    model = _model("Llama")
    save_prefix(make_prefix(model, _IDS), tmp_path / "a")
    facts = read_context(tmp_path / "a").facts["continuation"]
    assert 0 < max(facts["logits"], facts["generation"], facts["padded"]) < continuation.TOLERANCE
    assert facts["padding"] is True
    assert facts["transformers"] == continuation.versions()["transformers"]
    calls = []
    monkeypatch.setattr(store, "check", lambda *_: calls.append(1) or found)
    found = continuation.Continuation.from_json(facts)
    assert found is not None
    store.load_prefix(tmp_path / "a", model)
    assert not calls
    monkeypatch.setattr(continuation, "versions", lambda: {"torch": "1", "transformers": "1"})
    store.load_prefix(tmp_path / "a", model)
    assert calls
    for damage in ({"padding": 1}, {"logits": None}, {"generation": "0"}):
        assert continuation.Continuation.from_json(facts | damage | continuation.versions()) is None


def _hooked(model: Any, change: Any) -> Any:
    """The model with keyword arguments of its forward changed by ``change``."""

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        change(kwargs)
        return args, kwargs

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def test_a_model_that_ignores_its_mask_takes_no_padding() -> None:
    def change(kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = None

    cache = make_prefix(_hooked(_model("Llama", initializer_range=0.2), change), _IDS)
    assert not cache.takes_padding


def test_a_model_that_generates_otherwise_is_refused() -> None:
    def change(kwargs: dict[str, Any]) -> None:
        # Only generation gives positions.
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])

    model = _hooked(_model("Llama", initializer_range=0.2), change)
    with pytest.raises(ArtifactError, match="in tokens generated after a cached beginning"):
        make_prefix(model, _IDS)
    # eval's own use of a prefix does not generate.
    make_prefix(model, _IDS, generates=False)


def test_a_model_without_one_table_of_embeddings_is_refused() -> None:
    import transformers

    config = transformers.MusicgenDecoderConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4
    )
    with pytest.raises(ArtifactError, match="no single table of token embeddings"):
        make_prefix(transformers.MusicgenForCausalLM(config).eval(), torch.arange(3, 9).view(1, -1))


def test_a_padding_token_within_the_prefix_is_tried() -> None:
    """Kosmos-2 counts no position for it in one pass, and one after a cached beginning."""
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextConfig, Kosmos2TextForCausalLM

    torch.manual_seed(0)
    config = Kosmos2TextConfig(
        vocab_size=60, embed_dim=32, layers=2, ffn_dim=64, attention_heads=4, pad_token_id=1, init_std=0.3
    )
    model = Kosmos2TextForCausalLM(config).eval()
    assert make_prefix(model, torch.tensor([[5, 6, 7, 8]])).tokens.shape == (1, 4)
    with pytest.raises(ArtifactError, match="does not continue"):
        make_prefix(model, torch.tensor([[5, 1, 7, 8]]))
