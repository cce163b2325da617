"""Artifacts in the serving layout in stock transformers with compressed-tensors (`make test-serving`): the same logits
where weights alone are quantized, the same weights where inputs are rounded too. What stock cannot load, loads here.

The files are written in the same process, and read by `from_pretrained` without any code of ours.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import TOKENS, stock

import loadstone

pytestmark = pytest.mark.serving

WEIGHTS_ONLY = [
    "intx4-weight-only",
    "intx4-weight-only:group_size=64,rounding=mse",
    "intx4-weight-only:group_size=0",
    "intx4-weight-only:bits=8",
    "int8-weight-only",
    "float8-weight-only",
    "nvfp4-weight-only",
    "mxfp4-dynamic-act-mxfp4-weight",
]
WITH_INPUTS = [
    "int8-dynamic-act-int8-weight",
    "float8-dynamic-act-float8-weight",
    "mxfp8-dynamic-act-mxfp8-weight",
]
MIXED = r"""
default: intx4-weight-only
rules:
  - {modules: "re:model\\.layers\\.0\\..*", scheme: skip}
  - {modules: self_attn, scheme: int8-dynamic-act-int8-weight}
"""
# What transformers 5.23 with compressed-tensors 0.20 does not load: (recipe, experts) -> its error, or wrong weights.
FAILS = {
    ("int8-dynamic-act-int8-weight", True): RuntimeError,
    ("mxfp8-dynamic-act-mxfp8-weight", True): RuntimeError,
    ("intx4-weight-only:mapping=asymmetric", False): RuntimeError,
    ("intx4-weight-only:mapping=asymmetric", True): RuntimeError,
    ("nvfp4-weight-only", True): None,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mixtral") / "model"
    MixtralForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(params=["llama", "qwen3-moe", "mixtral"])
def family(
    request: pytest.FixtureRequest, tiny: Path, make_model: Callable[..., Path], mixtral: Path
) -> Path:
    if request.param == "qwen3-moe":
        return make_model("qwen3-moe")
    return mixtral if request.param == "mixtral" else tiny


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def differing(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[str]:
    """Parameters that differ, once stock has unpacked its own at the first forward."""
    found = dict(theirs.named_parameters())
    return [n for n, p in ours.named_parameters() if n not in found or not torch.equal(p, found[n])]


@pytest.mark.parametrize("recipe", [*WEIGHTS_ONLY, *WITH_INPUTS, "intx4-weight-only:mapping=asymmetric"])
def test_stock_loads_the_same(recipe: str, family: Path, tmp_path: Path) -> None:
    loadstone.finalize(family, tmp_path / "out", recipe=recipe, layout="compressed-tensors")
    ours = loadstone.load(tmp_path / "out")
    experts = any("experts" in name for name, _ in ours.named_parameters())
    expected = logits(ours)
    assert expected.isfinite().all()
    packed = loadstone.detect(tmp_path / "out").packed
    if experts and not any("experts" in name for name in packed):
        # Their width takes no group of 64, so they are plain, which stock does not merge beside packed layers.
        with pytest.raises(RuntimeError):
            stock(tmp_path / "out")
        return
    if (recipe, experts) in FAILS:
        error = FAILS[recipe, experts]
        if error:
            with pytest.raises(error):
                stock(tmp_path / "out")
            return
        theirs = stock(tmp_path / "out")
        assert not torch.equal(logits(theirs), expected)
        assert all("experts" in name for name in differing(ours, theirs))
        return
    theirs = stock(tmp_path / "out")
    found = logits(theirs)
    assert differing(ours, theirs) == []
    if recipe in WEIGHTS_ONLY:
        assert torch.equal(found, expected)
    else:
        assert not torch.equal(found, expected)
        assert (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_float8_blocks_load_in_stock(tmp_path: Path) -> None:
    """Widths of the tiny models above are no multiple of 128."""
    recipe = "float8-dynamic-act-float8-weight:granularity=block"
    loadstone.finalize("builtin:tiny-llama", tmp_path / "out", recipe=recipe, layout="compressed-tensors")
    ours, theirs = loadstone.load(tmp_path / "out"), stock(tmp_path / "out")
    expected, found = logits(ours), logits(theirs)
    assert differing(ours, theirs) == []
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_mixed_schemes_load_in_stock(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MIXED)
    loadstone.finalize(tiny, tmp_path / "out", recipe=tmp_path / "r.yaml", layout="compressed-tensors")
    ours, theirs = loadstone.load(tmp_path / "out"), stock(tmp_path / "out")
    logits(theirs)
    assert differing(ours, theirs) == []


def test_without_a_status_stock_is_silently_wrong(tiny: Path, tmp_path: Path) -> None:
    """The reason why `inspect` refuses it."""
    import json

    loadstone.finalize(tiny, tmp_path / "out", recipe="intx4-weight-only", layout="compressed-tensors")
    expected = logits(loadstone.load(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert not torch.equal(logits(stock(tmp_path / "out")), expected)
    assert torch.equal(logits(loadstone.load(tmp_path / "out")), expected)
