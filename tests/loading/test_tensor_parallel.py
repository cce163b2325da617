"""Which models can be divided among ranks, and how much of one each rank holds; tests/evaluation/test_parallel.py loads
them on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import packed
from tests.small_models import make_model

import loadstone
from loadstone.errors import UsageError
from loadstone.loading.tensor_parallel import divided_share, tensor_plan


def saved(directory: Path, **changes: Any) -> Path:
    make_model(**changes).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(
        tmp_path_factory.mktemp("llama"), hidden_size=128, intermediate_size=256, num_key_value_heads=4
    )


def refused(directory: Path, message: str, ranks: int = 2) -> None:
    with pytest.raises(UsageError, match=message):
        divided_share(loadstone.plan(directory), ranks)


def test_each_rank_holds_its_part_and_the_norms(llama: Path) -> None:
    norms = 5 * 128
    whole = sum(
        p.numel()
        for p in make_model(hidden_size=128, intermediate_size=256, num_key_value_heads=4).parameters()
    )
    for ranks in (2, 4):
        assert divided_share(loadstone.plan(llama), ranks) == ((whole - norms) / ranks + norms) / whole


def test_what_does_not_divide_evenly_is_named(llama: Path, tmp_path: Path) -> None:
    refused(llama, r"num_attention_heads \(4\) do not divide among 8 ranks", 8)
    odd = saved(tmp_path / "odd", intermediate_size=63)
    gpt_oss = packed.mxfp4(tmp_path / "gpt-oss")
    refused(gpt_oss, "3 experts of 'model.layers.0.mlp.experts.gate_up_proj' do not divide among 2 ranks")
    assert 0.4 < divided_share(loadstone.plan(gpt_oss), 3) < 0.6
    refused(odd, "63 (rows|columns) of 'model.layers.0.mlp.*' do not divide among 2 ranks")


def test_models_whose_plan_fails_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.HrmTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=4
    )
    config.architectures = ["HrmTextForCausalLM"]
    config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file(
        {"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    refused(tmp_path, "no tensor-parallel plan that works for HrmTextForCausalLM")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int8-dynamic-act-int4-weight", "rounds or scales its inputs, which no rank sees whole"),
        ("nvfp4-weight-only", r"torchao does not cut .* \(NVFP4Tensor, 2 dimensions\)"),
        (
            "intx4-weight-only:group_size=128",
            "groups of 128 columns of .*down_proj.* do not divide among 4 ranks",
        ),
    ],
)
def test_torchao_tensors_that_cannot_be_cut(llama: Path, recipe: str, message: str, tmp_path: Path) -> None:
    loadstone.finalize(llama, tmp_path / "out", recipe=recipe)
    refused(tmp_path / "out", message, 4)


def test_a_tied_head_stays_whole_where_the_plan_leaves_the_embedding_whole() -> None:
    model = make_model(tie_word_embeddings=True)
    assert "lm_head" in tensor_plan(model)
    # The plan of transformers before 5.20.
    model._tp_plan = {name: style for name, style in model._tp_plan.items() if "embed_tokens" not in name}
    assert "lm_head" not in tensor_plan(model) and "model.layers.*.mlp.up_proj" in tensor_plan(model)
