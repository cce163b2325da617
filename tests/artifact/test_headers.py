"""Safetensors headers: what the format allows is read, what it forbids is refused by name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from builders import edit_header, write_raw, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.artifact.formats.safetensors import MAX_HEADER_BYTES, read_header
from loadstone.errors import ArtifactError

TENSORS = {"a": ("BF16", (4, 8)), "b": ("I8", (3,)), "empty": ("F32", (0, 5)), "scalar": ("F32", ())}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS, {"format": "pt"})
    return path


def test_reads_names_dtypes_shapes_and_places(file: Path) -> None:
    header = read_header(file)
    assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == TENSORS
    assert header.metadata == {"format": "pt"}
    assert [t.nbytes for t in header.tensors.values()] == [64, 3, 0, 4]
    assert header.tensors["scalar"].end == header.file_bytes == file.stat().st_size
    assert header.tensors["a"].numel == 32 and header.tensors["scalar"].numel == 1


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "x": torch.ones(3, 5, dtype=torch.bfloat16),
        "y": torch.zeros(7, dtype=torch.int64),
        "z": torch.ones(0),
    }
    safetensors.save_file(tensors, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    assert {n: t.shape for n, t in header.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    raw = (tmp_path / "m.safetensors").read_bytes()
    y = header.tensors["y"]
    assert raw[y.begin : y.end] == bytes(56)


def test_zero_size_tensors_may_share_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(
        path, {"e1": ("F32", (0,)), "e2": ("F32", (0, 3)), "a": ("U8", (2,)), "e3": ("F32", (0,))}
    )
    assert len(read_header(path).tensors) == 4


def swap(name: str, key: str, value: object):
    return lambda header: header[name].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap("a", "dtype", "F99"), "tensor 'a' has the unknown dtype 'F99'"),
        (swap("a", "dtype", ["BF16"]), "tensor 'a' has a malformed"),
        (swap("a", "dtype", "F32"), "'a' holds 64 bytes, [4, 8] of F32 needs 128"),
        (swap("a", "shape", [4, 9]), "tensor 'a' holds 64 bytes"),
        (swap("a", "shape", [-4, -8]), "tensor 'a' has a malformed"),
        (swap("a", "shape", [2**62, 2**62]), "tensor 'a' holds 64 bytes"),
        (swap("a", "shape", [2**64]), "tensor 'a' has a malformed"),
        (swap("a", "shape", [4.0, 8]), "tensor 'a' has a malformed"),
        (swap("a", "shape", [True, 32]), "tensor 'a' has a malformed"),
        (swap("a", "shape", None), "tensor 'a' has a malformed"),
        (swap("a", "data_offsets", [64, 0]), "tensor 'a' has a malformed"),
        (swap("a", "data_offsets", [-64, 0]), "tensor 'a' has a malformed"),
        (swap("a", "data_offsets", [0, 64, 0]), "tensor 'a' has a malformed"),
        (swap("b", "data_offsets", [61, 64]), "tensor 'b' overlaps"),
        (swap("b", "data_offsets", [0, 3]), "overlaps"),
        (swap("scalar", "data_offsets", [70, 74]), "tensor 'scalar' leaves unnamed bytes"),
        (lambda h: h.pop("scalar"), "4 bytes after the last tensor"),
        (
            lambda h: h.update({"more": {"dtype": "U8", "shape": [9], "data_offsets": [71, 80]}}),
            "truncated, tensor 'more'",
        ),
        (lambda h: h.update({"x\x1b[2J": h.pop("a")}), "unprintable characters"),
        (lambda h: h.update({"a": 7}), "tensor 'a' has a malformed"),
        (lambda h: h.update({"__metadata__": {"format": 1}}), "__metadata__ must map strings"),
        (lambda h: h.update({"__metadata__": ["pt"]}), "__metadata__ must map strings"),
    ],
)
def test_refuses_by_name(file: Path, change, words: str) -> None:
    edit_header(file, change)
    with pytest.raises(ArtifactError) as caught:
        read_header(file)
    assert words in caught.value.message and "model.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (struct.pack("<Q", 10) + b"{}", "truncated, the header needs 18 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", "header claims 1152921504606846976 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "over the limit"),
        (struct.pack("<Q", 4) + b"nope", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
    ],
)
def test_refuses_what_is_no_header(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=words):
        read_header(path)


def test_refuses_duplicate_names(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    write_raw(tmp_path / "m", f'{{"z": {entry}, "a": {entry}, "a": {entry}}}'.encode(), b"\0")
    with pytest.raises(ArtifactError, match="'a' is duplicated"):
        read_header(tmp_path / "m")


def test_refuses_deep_and_wide_json(tmp_path: Path) -> None:
    write_raw(tmp_path / "deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_header(tmp_path / "deep")
    write_raw(tmp_path / "wide", b'{"a":[' + b"[]," * 5_000_000 + b"0]}")
    with pytest.raises(ArtifactError, match="over 4000000 items"):
        read_header(tmp_path / "wide")


def test_a_sink_gets_every_problem_and_the_good_tensors_remain(file: Path) -> None:
    def change(header: dict) -> None:
        header["a"]["dtype"] = "F99"
        header["b"]["shape"] = [4]

    edit_header(file, change)
    problems: list[ArtifactError] = []
    header = read_header(file, problems.append)
    assert [p.message.split("'")[1] for p in problems] == ["a", "b"]
    assert set(header.tensors) == {"empty", "scalar"}


def test_truncation_is_one_problem_that_counts(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 6)
    problems: list[ArtifactError] = []
    read_header(file, problems.append)
    (problem,) = problems
    assert "tensor 'b' ends at" in problem.message and "(and 2 more)" in problem.message


_KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "é", "\ud800"])
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**65)
    | st.text(max_size=4)
    | st.sampled_from(["BF16", "U8", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "random"
    for content in (raw, struct.pack("<Q", len(raw)) + raw):
        path.write_bytes(content)
        with contextlib.suppress(ArtifactError):
            read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(_KEYS, _JSON, max_size=4), data=st.binary(max_size=8))
def test_random_headers_never_raise_anything_else(tmp_path: Path, header: dict, data: bytes) -> None:
    path = tmp_path / "random"
    write_raw(path, json.dumps(header).encode(), data)
    for sink in (None, [].append):
        with contextlib.suppress(ArtifactError):
            read_header(path) if sink is None else read_header(path, sink)
