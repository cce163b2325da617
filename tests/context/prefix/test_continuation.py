"""A prefix continues as one pass would, or the model's class is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.context.prefix.test_prefix import _SIZES

from loadstone.context.prefix.fit import make_prefix
from loadstone.context.prefix.store import save_prefix
from loadstone.errors import ArtifactError

_IDS = torch.arange(3, 43)[None]


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
