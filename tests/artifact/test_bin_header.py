"""``.bin`` shards, against files that torch itself wrote, and pickles that would do harm."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone import detect
from loadstone.artifact.formats.bin import MAX_PICKLE_BYTES, read_bin
from loadstone.artifact.formats.inert_pickle import MalformedPickle, Node, read_pickle
from loadstone.errors import ArtifactError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint16: "U16",
}


def test_plain_tensors_of_every_dtype(tmp_path: Path) -> None:
    state = {name: torch.zeros(2, 3, dtype=dtype) for dtype, name in DTYPES.items()}
    contents = read_bin(save(tmp_path / "m.bin", state))
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in contents.tensors.items()} == {
        n: (n, (2, 3), state[n].nbytes) for n in state
    }
    assert not contents.subclasses and not contents.quantized


def test_parameters_scalars_views_and_buffers(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.BatchNorm1d(6)
    state = OrderedDict(module.state_dict())
    state |= {
        "parameter": torch.nn.Parameter(base.clone()),
        "t": base.t(),
        "row": base[2],
        "scalar": torch.tensor(1),
    }
    state["count"] = 7
    contents = read_bin(save(tmp_path / "m.bin", state))
    assert contents.tensors["t"].shape == (6, 4) and contents.tensors["row"].shape == (6,)
    assert contents.tensors["scalar"].shape == () and contents.tensors["scalar"].dtype == "I64"
    assert contents.tensors["parameter"].shape == (4, 6)
    assert "count" not in contents.tensors and "running_mean" in contents.tensors


def test_tied_tensors_are_found(tmp_path: Path) -> None:
    weight = torch.zeros(4, 2)
    contents = read_bin(
        save(tmp_path / "m.bin", {"embed": weight, "other": torch.zeros(4, 2), "head": weight})
    )
    assert contents.shared == (("embed", "head"),)


def test_a_nested_state_dict(tmp_path: Path) -> None:
    contents = read_bin(save(tmp_path / "m.bin", {"epoch": 3, "state_dict": {"a": torch.zeros(2)}}))
    assert set(contents.tensors) == {"a"}


def quantized_state(config) -> dict:
    from torchao.quantization import quantize_

    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    quantize_(model, config)
    return dict(model.state_dict())


def intx_config():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


def test_torchao_tensors_read_as_their_safetensors_form_would(tmp_path: Path) -> None:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig

    from loadstone.artifact.torchao.tensors import part_name

    for config in (intx_config(), Int8WeightOnlyConfig(set_inductor_config=False), NVFP4WeightOnlyConfig()):
        state = quantized_state(config)
        flat = read_bin(save(tmp_path / "m.bin", state)).quantized["0.weight"]
        parts, metadata = flatten_tensor_state_dict(state)
        expected = json.loads(metadata["0.weight"])
        assert flat.type == expected["_type"]
        assert {part_name("0.weight", d): p.shape for d, p in flat.parts.items()} == {
            n: tuple(t.shape) for n, t in parts.items()
        }
        assert flat.shape == (32, 64) and flat.nbytes == sum(t.nbytes for t in parts.values())
        for name, value in expected["_data"].items():
            assert flat.attributes[name] == value, name


def test_sharded_bins_are_held_against_their_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    save(tmp_path / first, {"a": torch.zeros(2)})
    save(tmp_path / second, {"b": torch.zeros(2)} | quantized_state(intx_config()))
    good = {"a": first, "b": second, "0.weight": second}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": good}))
    assert detect(tmp_path).kind == "torchao-unmarked"
    for weight_map, words in (
        (good | {"ghost": first}, f"{first}: tensor 'ghost' is named by"),
        (good | {"b": first}, f"puts 'b' in {first}, it is in {second}"),
        ({"a": first, "b": second}, f"{second}: tensor '0.weight' is not in"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ArtifactError, match=re.escape(words)):
            detect(tmp_path)
    index.write_text(json.dumps({"weight_map": good}))
    save(tmp_path / second, {"a": torch.ones(2), "b": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=f"'a' is in both {first} and {second}"):
        detect(tmp_path)


class Evil:
    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda mark: {"a": torch.zeros(2), "b": Evil(os.system, f"touch {mark}")}, "posix.system"),
        (lambda mark: Evil(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: {"a": Evil(eval, f"open({str(mark)!r}, 'w')")}, "builtins.eval"),
        (lambda mark: OrderedDict(a=Evil(exec, f"open({str(mark)!r}, 'w')")), "builtins.exec"),
        (lambda mark: {"a": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    ],
)
def test_nothing_is_ever_called(tmp_path: Path, make, name: str) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "m.bin", make(mark))
    with pytest.raises(ArtifactError, match=f"would call {name}"):
        read_bin(path)
    assert not mark.exists()


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def test_a_storage_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"a": torch.zeros(8)})
    with zipfile.ZipFile(path) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    archive(path, {n: c[:16] if n.endswith("data/0") else c for n, c in entries.items()})
    with pytest.raises(ArtifactError, match=r"m\.bin: truncated, storage '0' has 16 bytes"):
        read_bin(path)


def test_zip_bombs_are_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="over the limit"):
        read_bin(archive(tmp_path / "m", {"m/data.pkl": bytes(MAX_PICKLE_BYTES + 1)}, zipfile.ZIP_DEFLATED))
    path = archive(tmp_path / "n", {"m/data.pkl": b"."})
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.rfind(b"PK\5\6") + 12, 2**31)
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="zip directory claims"):
        read_bin(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\5\6", b"\x80\x02}q\x00.", pickle.dumps({"a": 1})],
)
def test_no_zip_is_an_error_that_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.bin: truncated, or in PyTorch's format from before 1\.6"):
        read_bin(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02K\x05.", "no state dict"),
        (b"\x80\x02]q\x00.", "no state dict"),
        (b"\x80\x02}", "malformed"),
        (b"", "malformed"),
        (b"R.", "malformed"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", ""),
        (b"(((((" * 1000 + b".", "malformed"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "would call|malformed"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.", ""),
    ],
)
def test_odd_pickles(tmp_path: Path, data: bytes, words: str) -> None:
    path = archive(tmp_path / "m.bin", {"m/data.pkl": data})
    if not words:
        assert read_bin(path).tensors == {}
        return
    with pytest.raises(ArtifactError, match=words):
        read_bin(path)


def test_the_machine_follows_the_standard_pickler() -> None:
    value = {"l": [1, (2.5, "x"), None], "d": {"t": True}, "s": {1}, "f": frozenset([b"y"]), "big": 2**70}
    for protocol in (2, 3, 4, 5):
        node, _ = read_pickle(pickle.dumps(value, protocol))
        pairs = node.pairs()
        assert pairs["l"] == [1, (2.5, "x"), None] and pairs["big"] == 2**70
        assert pairs["d"].pairs() == {"t": True}


def test_a_loop_is_no_trouble() -> None:
    loop: list = []
    loop.append(loop)
    assert isinstance(read_pickle(pickle.dumps(loop, 2))[0], list)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_random_pickles_never_raise_anything_else(data: bytes) -> None:
    for content in (data, b"\x80\x02" + data + b"."):
        with contextlib.suppress(MalformedPickle):
            read_pickle(content)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_flipped_byte_never_raises_anything_else(tmp_path: Path, position: int, byte: int) -> None:
    buffer = io.BytesIO()
    torch.save(OrderedDict(a=torch.zeros(2, 3), b=torch.nn.Parameter(torch.ones(2))), buffer)
    raw = bytearray(buffer.getvalue())
    raw[position % len(raw)] = byte
    (tmp_path / "m.bin").write_bytes(raw)
    with contextlib.suppress(ArtifactError):
        read_bin(tmp_path / "m.bin")


def test_nodes_ignore_keys_that_are_no_names() -> None:
    node = Node("dict", (), None, [(1, 2), ("a", 3), 4])
    assert node.pairs() == {"a": 3}
