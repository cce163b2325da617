"""Models whose class is code in their directory, as people wrote it for transformers 4."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers import run
from tests.small_models import make_tokenizer

import loadstone
from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.tensor_parallel import divided_share

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PretrainedConfig):
    model_type = "odd"


class OddModel(PreTrainedModel):
    config_class = OddConfig
    # more

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(400, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 400)
        self.register_buffer("frequencies", 1 / torch.arange(1, 33), persistent=False)
        self.register_buffer("filled", torch.empty(32), persistent=False)
        self.scale = torch.full((32,), 0.5)
        self.post_init()

    def _init_weights(self, module):
        if module is self:
            module.filled.fill_(2.0)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, **others):
        x = self.embed(input_ids) * self.frequencies * self.filled * self.scale
        return CausalLMOutput(logits=self.head(x + self.down(self.up(x).relu())))
"""
AUTO_MAP = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
IDS = torch.arange(20)[None]


@pytest.fixture
def odd(tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A directory of such a model, and the logits that its class computes by itself."""

    def make(code: str = CODE, **config: Any) -> tuple[Path, torch.Tensor]:
        path = tmp_path / "odd"
        path.mkdir()
        (path / "modeling_odd.py").write_text(CODE)
        spec = importlib.util.spec_from_file_location("modeling_odd_of_tests", path / "modeling_odd.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(3)
        found = {"model_type": "odd", "architectures": ["OddModel"], "dtype": "float32", "auto_map": AUTO_MAP}
        (path / "config.json").write_text(json.dumps(found | config))
        make_tokenizer().save_pretrained(path)
        (path / "modeling_odd.py").write_text(code)
        model = module.OddModel(module.OddConfig()).eval()
        model.filled.fill_(2.0)
        save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            return path, model(IDS).logits

    return make


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return loadstone.load(path, trust_remote_code=True)(IDS).logits


@pytest.mark.parametrize("key", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_what_the_code_computes_as_it_is_built(
    odd: Callable[..., tuple[Path, torch.Tensor]], key: str, tmp_path: Path
) -> None:
    path, expected = odd(auto_map={"AutoConfig": AUTO_MAP["AutoConfig"], key: "modeling_odd.OddModel"})
    assert torch.equal(logits(path), expected)
    plain = loadstone.finalize(path, tmp_path / "plain", trust_remote_code=True).out
    assert torch.equal(logits(plain), expected)
    for number, layout in enumerate(("torchao", "compressed-tensors")):
        out = tmp_path / str(number)
        loadstone.finalize(path, out, recipe="int8-weight-only", layout=layout, trust_remote_code=True)
        assert torch.allclose(logits(out), expected, atol=0.05) and not torch.equal(logits(out), expected)
        evaluated = {"limit": 2, "context_length": 32, "trust_remote_code": True}
        ours, theirs = loadstone.evaluate([out, path], dtype="float32", **evaluated).records
        assert abs(ours["loss"] - theirs["loss"]) < 0.01
        # In another dtype than the stored one, which stock transformers ends in a product of two.
        other = loadstone.load(out, dtype="bfloat16", trust_remote_code=True)
        assert torch.allclose(other(IDS).logits.float(), expected, atol=0.1)
    with pytest.raises(UsageError, match="its model class is code in the directory"):
        divided_share(loadstone.plan(path, trust_remote_code=True), 2)


def test_a_module_under_two_names(odd: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    path, expected = odd()
    code = CODE.replace("self.post_init()", "self.again = self.up\n        self.post_init()")
    (path / "modeling_odd.py").write_text(code)
    assert torch.equal(logits(path), expected)
    out = loadstone.finalize(path, tmp_path / "out", recipe="int8-weight-only", trust_remote_code=True).out
    assert torch.allclose(logits(out), expected, atol=0.05)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("# more", "_tied_weights_keys = ['head.weight']", "its own code fails"),
        ("self.post_init()", "pass", "its own code fails"),
        (
            "1 / torch.arange(1, 33)",
            "self.embed.weight.detach()[0].clone()",
            "its own code fails|computed from",
        ),
    ],
)
def test_code_that_transformers_5_does_not_run(
    odd: Callable[..., tuple[Path, torch.Tensor]], old: str, new: str, says: str, tmp_path: Path
) -> None:
    path, _ = odd(CODE.replace(old, new), tie_word_embeddings="tied" in new)
    calls: list[Callable[[], Any]] = [lambda: logits(path)]
    if "arange" not in old:
        calls.append(lambda: loadstone.finalize(path, tmp_path / "out", trust_remote_code=True))
        calls.append(
            lambda: loadstone.export_fakequant(path, tmp_path / "out", format="fp8", trust_remote_code=True)
        )
    for call in calls:
        with pytest.raises(ArtifactError, match=says) as refused:
            call()
        assert "Restore config.json" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_export_without_the_code_says_so(
    odd: Callable[..., tuple[Path, torch.Tensor]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, expected = odd()
    export = ["export-fakequant", "-M", path, "--format", "int8", "--trust-remote-code", "-o"]
    assert "--remote-code copy keeps the code" in run(capsys, *export, tmp_path / "without")[2]
    code, _, err = run(capsys, *export, tmp_path / "with", "--remote-code", "copy")
    assert code == 0 and "keeps the code" not in err
    assert torch.allclose(logits(tmp_path / "with"), expected, atol=0.05)
