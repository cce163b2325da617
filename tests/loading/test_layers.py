"""The decoder layers of a model are found, whatever it is called and whatever else it is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.helpers import run
from transformers.initialization import no_init_weights

import loadstone
from loadstone.artifact import detect
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run as evaluate
from loadstone.evaluation.scoring.compiling import compile_layers
from loadstone.loading.layers import layer_stack

# Every kind of name for the list of layers, language models inside multimodal ones, lists beside that of the layers,
# layers of several classes. Sizes are the defaults: on the meta device they cost nothing.
STACKS = {
    "LlamaForCausalLM": "model.layers",
    "GPT2LMHeadModel": "transformer.h",
    "BloomForCausalLM": "transformer.h",
    "GPTJForCausalLM": "transformer.h",
    "GPTNeoXForCausalLM": "gpt_neox.layers",
    "MptForCausalLM": "transformer.blocks",
    "OPTForCausalLM": "model.decoder.layers",
    "MambaForCausalLM": "backbone.layers",
    "JambaForCausalLM": "model.layers",
    "Zamba2ForCausalLM": "model.layers",
    "BartForConditionalGeneration": "model.decoder.layers",
    "T5ForConditionalGeneration": "decoder.block",
    "Gemma3ForConditionalGeneration": "model.language_model.layers",
    "Gemma3nForCausalLM": "model.layers",
    "BltForCausalLM": "model.global_transformer.layers",
    "Florence2ForConditionalGeneration": "model.language_model.decoder.layers",
    "LlavaForConditionalGeneration": "model.language_model.layers",
    "Qwen2_5_VLForConditionalGeneration": "model.language_model.layers",
    "Mistral3ForConditionalGeneration": "model.language_model.layers",
    "MllamaForConditionalGeneration": "model.language_model.layers",
    "Idefics3ForConditionalGeneration": "model.text_model.layers",
    "Llama4ForConditionalGeneration": "language_model.model.layers",
}


@pytest.mark.parametrize("name", STACKS)
def test_finds_the_layers_of_the_language_model(name: str) -> None:
    kind: Any = getattr(transformers, name)
    with torch.device("meta"), no_init_weights():
        model = kind(kind.config_class())
    stack = layer_stack(model)
    assert stack is not None and stack.name == STACKS[name]
    assert stack.layers is model.get_submodule(stack.name)


def test_several_lists_in_parallel_are_not_layers() -> None:
    # XLM keeps attentions, norms and feed-forward parts of its layers in a list each.
    with torch.device("meta"), no_init_weights():
        assert layer_stack(transformers.XLMWithLMHeadModel(transformers.XLMConfig())) is None


def test_finds_layers_without_transformers_marks() -> None:
    class Config:
        num_hidden_layers = 3

        def get_text_config(self) -> Config:
            return self

    class Remote(torch.nn.Module):
        """A model class of its own, as remote code has: no `get_decoder`, plain modules as layers."""

        config = Config()

        def __init__(self) -> None:
            super().__init__()
            self.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    stack = layer_stack(Remote())
    assert stack is not None and stack.name == "layers"
    assert layer_stack(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None


def test_a_multimodal_model_is_streamed(gemma3: Path) -> None:
    options = Options((str(gemma3),), limit=2, batch_size=2, separator="2")
    resident, streamed = (evaluate(replace(options, stream=on)) for on in (False, True))
    for name, losses in resident.values.items():
        assert all(np.array_equal(losses[k], streamed.values[name][k]) for k in losses) and losses


def test_a_multimodal_model_is_calibrated(
    gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(
        "Where are the decoder layers of this model? In its language model.\n" * 9
    )
    recipe = "scheme: intx4-weight-only"
    (tmp_path / "all.yaml").write_text(
        f"default: intx4-weight-only\nrules:\n  - modules: vision_tower\n    {recipe}\n"
    )
    options = ["--recipe", tmp_path / "all.yaml", "--calibrate", tmp_path / "text.txt"]
    code, _, err = run(capsys, "finalize", "-M", gemma3, *options, "-o", tmp_path / "out")
    assert code == 0, err
    model = loadstone.load(tmp_path / "out")
    stack = layer_stack(model)
    assert (
        "outside of the decoder layers (model.language_model.layers) are rounded without calibration" in err
    )
    assert (
        stack is not None and type(stack.layers[1].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    )


def test_the_language_model_of_a_multimodal_one_is_compiled(gemma3: Path) -> None:
    model = loadstone.load(detect(gemma3))
    # `Module.compile` compiles at the first call: none is made here.
    assert compile_layers(model) == 2
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["model.language_model.layers.0", "model.language_model.layers.1"]
