"""`finalize --verify` sees what a broken writer makes: it reads by the rules of transformers and torchao."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import run

import loadstone
from loadstone.artifact import TensorInfo
from loadstone.artifact.source import SafetensorsSource
from loadstone.errors import ArtifactError
from loadstone.finalization import plan
from loadstone.finalization import run as writing
from loadstone.finalization.encoders import torchao as torchao_layout
from loadstone.finalization.encoders.compressed_tensors import PackedEncoding
from loadstone.finalization.encoders.torchao import TorchaoEncoder, TorchaoEncoding
from loadstone.quantization import RECIPES, serving
from loadstone.writing.index import write_index

from .test_finalize import ON_CPU, W4

PACKED = "compressed-tensors"
DOWN = "model.layers.1.mlp.down_proj"
Fault = Callable[[pytest.MonkeyPatch], None]


def _scales(encoding: type) -> Fault:
    """Every scale of one weight is a little too large."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        right: Any = encoding.encode  # type: ignore[attr-defined]

        def encode(self: Any, *args: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
            for name, part, offset in right(self, *args):
                wrong = name.startswith(DOWN) and name.endswith("weight_scale")
                yield name, part * 1.02 if wrong else part, offset

        patch.setattr(encoding, "encode", encode)

    return fault


def _read(change: Callable[[SafetensorsSource, TensorInfo], TensorInfo]) -> Fault:
    """The reader gives other bytes than the tensor's."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        right = SafetensorsSource.read
        patch.setattr(SafetensorsSource, "read", lambda s, info, *a, **k: right(s, change(s, info), *a, **k))

    return fault


def _other_layer(source: SafetensorsSource, info: TensorInfo) -> TensorInfo:
    """Two tensors of one shape, in different shards, are exchanged."""
    other = {"0": "1", "1": "0"}
    parts = [
        "".join(other.get(p, p)) if info.name.endswith("down_proj.weight") else p
        for p in info.name.split(".")
    ]
    return source.tensors[".".join(parts)]


def _two_bytes_on(source: SafetensorsSource, info: TensorInfo) -> TensorInfo:
    if info.name != "model.layers.0.input_layernorm.weight":
        return info
    return info._replace(begin=info.begin - 2, end=info.end - 2)


def _nibbles(patch: pytest.MonkeyPatch) -> None:
    right = serving.pack_ints

    def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
        return right(values.unflatten(1, (-1, 2)).flip(-1).flatten(1).contiguous(), bits)

    patch.setattr(serving, "pack_ints", pack)


def _header(patch: pytest.MonkeyPatch) -> None:
    right = TorchaoEncoder.header

    def header(self: TorchaoEncoder, encodings: Any) -> dict[str, str]:
        found = right(self, encodings)
        return found | {
            f"{DOWN}.weight": found[f"{DOWN}.weight"].replace("int8_asym_per_token", "int8_sym_per_token")
        }

    patch.setattr(TorchaoEncoder, "header", header)


def _config(patch: pytest.MonkeyPatch) -> None:
    right = torchao_layout._block
    patch.setattr(torchao_layout, "_block", lambda scheme, named: right(replace(scheme, bits=3), named))


def _names(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torchao_layout, "part_name", lambda name, part: name.replace(".weight", f".weight_{part}"))


def _experts(patch: pytest.MonkeyPatch) -> None:
    right = plan._fused
    turned = lambda found: {name: (*parts[2:], *parts[:2]) for name, parts in found.items()}  # noqa: E731
    patch.setattr(plan, "_fused", lambda *args: turned(right(*args)))


def _index(patch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, files: dict[str, str], size: int) -> None:
        one, *_, other = files
        write_index(folder, files | {one: files[other], other: files[one]}, size)

    patch.setattr(writing, "write_index", write)


@pytest.mark.parametrize(
    ("arch", "recipe", "layout", "fault", "says"),
    [
        ("llama-untied", W4, "torchao", _scales(TorchaoEncoding), f"{DOWN}._weight_scale' differs"),
        ("llama-untied", "intx4-weight-only", PACKED, _scales(PackedEncoding), f"{DOWN}.weight_"),
        ("llama-untied", None, "torchao", _read(_other_layer), "layers.0.mlp.down_proj.weight' has other values"),
        ("llama-untied", W4, "torchao", _read(_other_layer), "layers.0.mlp.down_proj._weight_qdata' differs"),
        ("llama-untied", "nvfp4-weight-only", PACKED, _read(_other_layer), "layers.0.mlp.down_proj.weight_"),
        ("llama-untied", W4, "torchao", _read(_two_bytes_on), "layers.0.input_layernorm.weight' has other values"),
        ("llama-untied", "intx4-weight-only", PACKED, _nibbles, "layers.0.mlp.down_proj.weight_"),
        ("llama-untied", W4, "torchao", _header, f"{DOWN}.weight' has an unknown activation"),
        ("llama-untied", W4, "torchao", _config, "down_proj.weight' holds int4, not int3"),
        ("llama-untied", W4, "torchao", _names, "down_proj.weight' lacks its part"),
        ("qwen3-moe", "float8-weight-only", "torchao", _experts, "experts._"),
        ("llama-untied", None, "torchao", _index, "puts 'lm_head.weight' in"),
    ],
)  # fmt: skip
def test_faults_of_the_writer(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arch: str, recipe: str | None, layout: str, fault: Fault, says: str,
) -> None:  # fmt: skip
    options = ["--quantize", recipe, "--layout", layout] if recipe else []
    command = [
        "finalize",
        "-q",
        "-M",
        make_model(arch),
        "-o",
        tmp_path / "out",
        "--max-shard-size",
        "60kB",
        "--verify",
    ]
    with monkeypatch.context() as patch:
        fault(patch)
        code, _, error = run(capsys, *command, *options)
    assert code == 3 and says in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch", "recipe", "layout"),
    [
        *(("llama-tied", recipe, "torchao") for recipe in [*ON_CPU, "intx4-weight-only:rounding=mse"]),
        *(("llama-tied", recipe, PACKED) for recipe in ON_CPU if RECIPES[recipe].scheme.serving),
        ("llama-tied", "intx4-weight-only:rounding=mse", PACKED),
        ("qwen3-moe", "float8-weight-only", "torchao"),
        ("qwen3-moe", "intx4-weight-only", PACKED),
        ("gpt2", None, "torchao"),
    ],
)
def test_what_is_right(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, recipe: str | None, layout: str
) -> None:
    done = loadstone.finalize(make_model(arch), tmp_path / "out", recipe=recipe, layout=layout, verify=True)
    assert done.verified == len(loadstone.detect(tmp_path / "out").tensors)


def test_float8_in_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "float8-dynamic-act-float8-weight:granularity=block"
    options: dict[str, Any] = {"recipe": recipe, "layout": PACKED, "verify": True}
    assert loadstone.finalize("builtin:tiny-llama", tmp_path / "right", **options).verified
    _scales(PackedEncoding)(monkeypatch)
    with pytest.raises(ArtifactError, match=DOWN):
        loadstone.finalize("builtin:tiny-llama", tmp_path / "wrong", **options)


def test_rows_of_zeros(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """torchao makes NaN of them in float8, loadstone zeros."""
    from safetensors.torch import load_file, save_file

    source = make_model("llama-untied")
    state = load_file(source / "model.safetensors")
    state[f"{DOWN}.weight"][3] = 0
    (tmp_path / "zeros").mkdir()
    save_file(state, tmp_path / "zeros" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "zeros" / "config.json").write_bytes((source / "config.json").read_bytes())
    loadstone.finalize(tmp_path / "zeros", tmp_path / "out", recipe="float8-weight-only", verify=True)


_STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig
source, *artifacts = sys.argv[1:]
assert not any(name.startswith("loadstone") for name in sys.modules)
tokens = torch.arange(3, 35)[None]
for artifact in artifacts:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto")
    block = json.loads(open(f"{artifact}/config.json").read())["quantization_config"]
    recipe = TorchAoConfig.from_dict(block)
    fresh = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=recipe)
    with torch.no_grad():
        print(torch.equal(model(tokens).logits, fresh(tokens).logits))
"""


def test_a_stock_load_in_a_process_of_its_own_agrees(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers without loadstone: the artifact computes as the source that transformers quantizes as it loads, and
    where `--verify` would find a fault it does not."""
    source = make_model("llama-untied")
    recipes = (W4, "float8-weight-only")
    for recipe in recipes:
        loadstone.finalize(source, tmp_path / recipe, recipe=recipe, verify=True)
    _scales(TorchaoEncoding)(monkeypatch)
    loadstone.finalize(source, tmp_path / "wrong", recipe=W4)
    artifacts = [str(tmp_path / name) for name in (*recipes, "wrong")]
    command = [sys.executable, "-c", _STOCK, str(source), *artifacts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]
