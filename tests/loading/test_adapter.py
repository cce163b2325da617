"""LoRA adapters merged into their base as it streams in, held to the formulas in plain torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loadstone
from loadstone.artifact.builtin import builtin_path
from loadstone.errors import ArtifactError, UsageError

PREFIX = "base_model.model."
Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(builtin_path("builtin:tiny-llama"), tmp_path / "base"))


def adapter(folder: Path, base: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": str(base)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({PREFIX + k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def stored(base: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}


def pair(weight: torch.Tensor, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)
    return torch.randn(rank, weight.shape[1]) / 9, torch.randn(weight.shape[0], rank) / 9


def factors(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("rank", "changes", "scale"),
    [
        (4, {}, 6 / 4),
        (4, {"use_rslora": True}, 6 / 2),
        (4, {"alpha_pattern": {"q_proj": 3}}, 3 / 4),
        (2, {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, 6 / 2),
    ],
)
def test_scales(base: Path, tmp_path: Path, rank: int, changes: dict[str, Any], scale: float) -> None:
    weights = stored(base)
    weight = weights[f"{Q}.weight"]
    a, b = pair(weight, rank)
    expected = weight.clone().add_((b @ a) * scale)
    folder = adapter(tmp_path / "adapter", base, factors(Q, a, b), **changes)
    found = loadstone.load(folder).state_dict()
    assert not torch.equal(expected, weight) and torch.equal(found[f"{Q}.weight"], expected)
    assert all(torch.equal(found[k], v) for k, v in weights.items() if k != f"{Q}.weight")


def test_finalize_merges_and_says_so(base: Path, tmp_path: Path) -> None:
    weights = stored(base)
    weight, embed = weights[f"{Q}.weight"], weights[f"{EMBED}.weight"]
    a, b = pair(weight)
    ea, eb = torch.randn(4, embed.shape[0]) / 9, torch.randn(embed.shape[1], 4) / 9
    norm = torch.rand_like(weights["model.norm.weight"])
    tensors = factors(Q, a, b) | {f"{EMBED}.lora_embedding_A": ea, f"{EMBED}.lora_embedding_B": eb}
    folder = adapter(tmp_path / "run" / "checkpoint-5", base, tensors | {"model.norm.weight": norm})
    (folder / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    done = loadstone.finalize(folder.parent, tmp_path / "out", verify=True)
    found = stored(done.out)
    assert torch.equal(found[f"{Q}.weight"], weight.clone().add_(b @ a * 1.5))
    assert torch.equal(found[f"{EMBED}.weight"], embed + ((eb @ ea).t() * 1.5).to(embed.dtype))
    assert torch.equal(found["model.norm.weight"], norm)
    assert not list(done.out.glob("adapter*")) and (done.out / "tokenizer.json").exists()
    assert json.loads((done.out / "tokenizer_config.json").read_text()) == {"of": "the adapter"}
    manifest = json.loads((done.out / "loadstone.json").read_text())
    assert manifest["source"]["adapter"]["merged"] == "LoRA of 2 weights and 1 trained tensors"
    quantized = loadstone.finalize(folder, tmp_path / "q", recipe="int8-weight-only")
    again = loadstone.finalize(done.out, tmp_path / "q2", recipe="int8-weight-only")
    names = [n for n in quantized.files if n.endswith(".safetensors")]
    assert names and all(quantized.files[n] == again.files[n] for n in names)


def test_weights_stored_with_inputs_first(base: Path, tmp_path: Path) -> None:
    weight = stored(base)[f"{Q}.weight"]
    b, a = (t.t() for t in pair(weight))
    folder = adapter(tmp_path / "adapter", base, factors(Q, a, b), fan_in_fan_out=True)
    expected = weight.clone().add_((b @ a).t() * 1.5)
    assert torch.equal(loadstone.load(folder).state_dict()[f"{Q}.weight"], expected)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    a, b = pair(stored(base)[f"{Q}.weight"])
    good = factors(Q, a, b)
    for number, (tensors, changes, match) in enumerate(
        [
            (good, {"use_dora": True}, "use_dora"),
            (good, {"peft_type": "IA3"}, "IA3"),
            (good, {"r": 8}, "rank 8"),
            (good, {"alpha_pattern": {"(": 1}}, "bad pattern"),
            (good | {f"{Q}.lora_magnitude_vector": b.clone()}, {}, "lora_magnitude_vector"),
            (factors("model.layers.99.q_proj", a, b), {}, "stores no"),
            ({f"{Q}.lora_A.weight": a}, {}, "missing"),
            (factors(Q, a[:, :3], b), {}, "shape"),
        ]
    ):
        with pytest.raises(ArtifactError, match=match):
            loadstone.detect(adapter(tmp_path / str(number), base, tensors, **changes))
    folder = adapter(tmp_path / "away", Path("org/name"), good)
    with pytest.raises(UsageError, match=r"org/name(?s:.)*--base"):
        loadstone.detect(folder)
    assert loadstone.detect(folder, base=base).kind == "adapter"
    with pytest.raises(UsageError, match="not an adapter"):
        loadstone.detect(base, base=base)
    for path in base.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    with pytest.raises(ArtifactError, match="full weights and an adapter"):
        loadstone.detect(folder, base=base)
