"""Which weights a model reads itself, held to what one forward pass does with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from loadstone.quantization.weight_use import weights_used_otherwise

_LAYERS: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1}
_STATE: dict[str, Any] = _LAYERS | {"hidden_size": 32, "state_size": 8, "pad_token_id": 0}
_STATE_2: dict[str, Any] = _STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
_BLOOM: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": (
        "Llama",
        _LAYERS | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
        set(),
    ),
    "mamba": ("Mamba", _STATE | {"time_step_rank": 8}, {"dt_proj"}),
    "mamba2 reads out_proj in training only": ("Mamba2", _STATE_2, set()),
    "bloom": ("Bloom", _BLOOM, set()),
    "bloom in slices": (
        "Bloom",
        _BLOOM | {"pretraining_tp": 2, "slow_but_exact": True},
        {"dense", "dense_4h_to_h"},
    ),
    "bloom in slices, not exact": ("Bloom", _BLOOM | {"pretraining_tp": 2}, set()),
}


class _Uses(TorchFunctionMode):
    """Notes the functions other than `linear` that take a weight."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights, self.found = weights, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(func, "__name__", "") == "__get__"
        if func is not torch.nn.functional.linear and not attribute:
            self.found |= {self.weights[id(a)] for a in args if id(a) in self.weights}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_a_forward_pass_reads(name: str) -> None:
    family, options, expected = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options, tie_word_embeddings=False)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    found = {module.rpartition(".")[2] for module in weights_used_otherwise(model)} - {"lm_head"}
    assert found == expected
    linears = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), _Uses(linears) as uses:
        model(torch.arange(6)[None])
    assert {module.rpartition(".")[2] for module in uses.found} == expected


def test_weights_whose_dtype_is_compared() -> None:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5))
    found = weights_used_otherwise(model)
    assert {module.rpartition(".")[2] for module in found} == {"wo"}
    assert set(found.values()) == {"T5DenseActDense reads it itself"}


class _Branches(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.parts, self.started = config, config.parts, False
        for name in ("train", "eval", "many", "few", "unset", "first", "either", "plain"):
            self.add_module(f"{name}_proj", nn.Linear(2, 2))

    def forward(self, x: Any) -> Any:
        if self.training and x.dim() > 1:
            return x @ self.train_proj.weight
        x = x if self.training else x @ self.eval_proj.weight
        if self.parts > 1:
            x = x @ self.many_proj.weight
        else:
            x = x @ self.few_proj.weight
        if self.config.clip is not None:
            x = x @ self.unset_proj.weight
        # A flag of the module itself may change after it was built.
        if self.started:
            x = x @ self.first_proj.weight
        if self.training or x.dim() > 1:
            x = x @ self.either_proj.weight
        return self.plain_proj(x)


def test_branches_that_are_never_taken_read_nothing() -> None:
    found = weights_used_otherwise(_Branches(SimpleNamespace(parts=1, clip=None)))
    assert set(found) == {"eval_proj", "few_proj", "first_proj", "either_proj"}
    found = weights_used_otherwise(_Branches(SimpleNamespace(parts=2, clip=1.0)))
    assert set(found) == {"eval_proj", "many_proj", "unset_proj", "first_proj", "either_proj"}
