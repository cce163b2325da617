"""The report holds together whatever a directory's JSON files contain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, TORCHAO_BLOCK, dense, edit_header, torchao, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.artifact.detect import detect
from loadstone.artifact.files import MAX_CONFIG_BYTES, read_json
from loadstone.artifact.formats.safetensors import read_header
from loadstone.artifact.report import collect
from loadstone.artifact.torchao.uniform import pattern_of
from loadstone.cli.inspect import _rows, as_dict
from loadstone.errors import ArtifactError, LoadstoneError

_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("torchao")
_VALUE = st.recursive(
    _LEAF,
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=6,
)
_CONFIG = st.fixed_dictionaries(
    {},
    optional={
        key: _VALUE | st.just(CONFIG.get(key)) | st.just(TORCHAO_BLOCK)
        for key in (
            *("model_type", "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "text_config"),
            *("quantization_config", "auto_map", "loadstone_qat"),
        )
    },
)
_SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def whole(directory: Path) -> dict[str, Any]:
    """The report in every form there is, as text."""
    report = collect(directory)
    problems: list[LoadstoneError] = list(report.problems)
    assert all(isinstance(text, str) for _, text in _rows(report, None, None))
    return json.loads(json.dumps(as_dict(report, None, problems, None)))


@settings(max_examples=150, deadline=None, suppress_health_check=_SLOW)
@given(config=_CONFIG, quantized=st.booleans())
def test_any_config(tmp_path: Path, config: dict, quantized: bool) -> None:
    directory = (torchao if quantized else dense)(tmp_path / f"m{quantized}", config=config)
    found = whole(directory)
    try:
        detect(directory)
        assert found["loadable"] or "output head" in found["problems"][0]["message"]
    except ArtifactError as error:
        assert error.message in [p["message"] for p in found["problems"]]


@settings(max_examples=60, deadline=None, suppress_health_check=_SLOW)
@given(
    value=_VALUE,
    name=st.sampled_from(["loadstone.json", "tokenizer_config.json", "model.safetensors.index.json"]),
)
def test_any_sidecar(tmp_path: Path, value: Any, name: str) -> None:
    directory = dense(tmp_path / "m", shards=2)
    keys = {"versions": value, "files": value, "chat_template": value, "weight_map": value, "metadata": value}
    for content in (value, keys):
        (directory / name).write_text(json.dumps(content))
        whole(directory)


@settings(max_examples=100, deadline=None, suppress_health_check=_SLOW)
@given(
    value=_VALUE,
    key=st.sampled_from(["_type", "_data", "_tensor_data_names", "block_size", "target_dtype", "dtype"]),
)
def test_any_description(tmp_path: Path, value: Any, key: str) -> None:
    directory = torchao(tmp_path / "m")

    def change(header: dict) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        description = json.loads(header["__metadata__"][name])
        (description if key.startswith("_") else description["_data"])[key] = value
        header["__metadata__"][name] = json.dumps(description)

    edit_header(directory / "model.safetensors", change)
    whole(directory)


def test_patterns() -> None:
    assert pattern_of("model.layers.12.mlp.experts.3.up.weight") == "model.layers.*.mlp.experts.*.up.weight"
    assert pattern_of("h.0") == "h.*" and pattern_of("conv1.weight") == "conv1.weight"


def test_a_layer_of_another_half_precision_is_named(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m")
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    tensors = dict.fromkeys(names, ("BF16", (8, 8))) | {names[0]: ("F16", (8, 8)), names[1]: ("F32", (8, 8))}
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (problem,) = collect(directory).problems
    assert problem.message == f"model.safetensors: tensor '{names[0]}' has dtype F16, other layers have BF16"


def test_files_that_could_block_or_fill_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read in (read_header, read_json):
        with pytest.raises(ArtifactError, match="fifo: not a regular file"):
            read(tmp_path / "fifo")
        with pytest.raises(ArtifactError, match=r"gone: cannot be read \(No such file"):
            read(tmp_path / "gone")
    (tmp_path / "long").write_text(json.dumps({"a": "x" * MAX_CONFIG_BYTES}))
    with pytest.raises(ArtifactError, match="long: 16000009 bytes, over the limit"):
        read_json(tmp_path / "long", MAX_CONFIG_BYTES)


@pytest.mark.parametrize(
    ("block", "packed"), [({}, 0), ({"quantization_config": {"quant_method": "hqq"}}, 8)]
)
def test_buffers_of_integers_are_no_parameters(tmp_path: Path, block: dict, packed: int) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "embeddings.word_embeddings.weight": np.ones((6, 4), dtype=np.float32),
        "embeddings.position_ids": np.arange(512)[None],
        "norm.num_batches_tracked": np.array(3),
        "attention.bias": np.ones((8, 8), dtype=bool),
        "attention.mask": np.ones((8, 8), dtype=bool),
        "attention.bias_mask": np.ones((8, 8), dtype=np.uint8 if not packed else bool),
        "attention.relative_position_index": np.ones((4, 4), dtype=np.int32 if not packed else np.int64),
        "layer.W_q": np.ones((2, 4), dtype=np.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"} | block))
    assert collect(tmp_path).parameters == 24 + packed
