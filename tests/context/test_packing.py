"""Packing loses nothing, makes real caches smaller, and unpacks nothing that claims more than it holds."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.artifact.context_errors import CorruptContext
from loadstone.artifact.context_file import CONTEXT_TENSORS, ContextFile
from loadstone.artifact.formats.safetensors import read_header
from loadstone.artifact.manifest import sha256_file
from loadstone.context.tabpfn.estimator import packing
from loadstone.context.tabpfn.packed_file import DESCRIPTION, PackedFile, packed_bytes, packed_parts
from loadstone.context.tabpfn.packing import Packing, deflate, gather, inflate, pack, scatter, unpack
from loadstone.writing.shards import write_parts

sys.path.insert(0, str(Path(__file__).parent))
from packed_contexts import redescribe

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [
    (5,),
    (1,),
    (3, 7),
    (2, 300, 2, 16),
    (700, 3),
    (1, 1, 1),
    (4, 4, 4),
    (40_000,),
]


def made(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    values = torch.randn(shape, generator=draw) * torch.linspace(0.1, 3, shape[-1] if shape else 1)
    return (values * (1 if dtype.is_floating_point else 20)).to(dtype)


def round_trip(tensor: torch.Tensor) -> tuple[torch.Tensor, Packing]:
    with ThreadPoolExecutor(2) as pool:
        how, chunks = pack(pool, tensor)
        data = b"".join(bytes(chunk) for chunk in chunks)
        how = Packing.from_json("x", json.loads(json.dumps(how.to_json())))
        found, waiting = unpack(pool, "x", how, lambda begin, size: data[begin : begin + size])
        for future in waiting:
            future.result()
    assert how.nbytes == tensor.nbytes and sum(how.sizes) == len(data)
    return found, how


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: also NaN, and zeros of either sign."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_large_tensors_come_back_in_every_bit(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = made(shape, dtype)
    assert same(round_trip(tensor)[0], tensor)
    # Many stretches, the last of them shorter; and a tensor that does not lie in a row.
    monkeypatch.setattr(packing, "SEGMENT", 1000)
    assert same(round_trip(tensor)[0], tensor)
    if len(shape) > 1:
        turned = tensor.transpose(0, -1)
        assert same(round_trip(turned)[0], turned)


def test_odd_values_survive() -> None:
    values = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-45] * 500)
    assert same(round_trip(values)[0], values)


def test_small_tensors_come_back() -> None:
    tensors = {
        f"{i}.{j}": made(shape, dtype) for i, dtype in enumerate(DTYPES) for j, shape in enumerate(SHAPES[:6])
    }
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    from loadstone.quantization.flatten import dtype_name

    entries = {name: (dtype_name(t.dtype), list(t.shape)) for name, t in tensors.items()}
    data = gather(tensors)
    assert len(data) == sum(t.nbytes for t in tensors.values())
    found = dict(scatter(entries, memoryview(data)))
    assert found.keys() == tensors.keys() and all(same(found[name], t) for name, t in tensors.items())
    with pytest.raises(ValueError):
        dict(scatter(entries, memoryview(data + b"1")))


def test_what_can_shrink_does_and_the_rest_is_left() -> None:
    draw = torch.Generator().manual_seed(0)
    # Exponents and quantized codes of channels with spreads of their own, as keys and values have.
    keys = torch.randn(1, 4000, 2, 32, generator=draw) * torch.logspace(-2, 0, 32)
    for tensor, most in (
        (keys.bfloat16(), 0.72), (keys, 0.85), ((keys / keys.abs().max() * 127).round().to(torch.int8), 0.6),
    ):  # fmt: skip
        found, how = round_trip(tensor)
        assert same(found, tensor) and sum(how.sizes) <= most * tensor.nbytes
    noise = torch.randint(0, 256, (1000, 100), generator=draw, dtype=torch.uint8)
    assert sum(round_trip(noise)[1].sizes) == noise.nbytes


# Crafted packings.


@pytest.mark.parametrize("change", [
    lambda e: e.__setitem__(0, "F4"), lambda e: e.__setitem__(0, ["F32"]), lambda e: e.__setitem__(1, [400, 0]),
    lambda e: e.__setitem__(1, [2**40, 50]), lambda e: e.__setitem__(1, [-400, -50]), lambda e: e.__setitem__(2, 0),
    lambda e: e.__setitem__(2, 49), lambda e: e.__setitem__(3, 0), lambda e: e.__setitem__(3, 1),
    lambda e: e.__setitem__(4, []), lambda e: e[4].append(5), lambda e: e.__setitem__(4, [-1] * len(e[4])),
    lambda e: e.__setitem__(4, [1.5] * len(e[4])), lambda e: e.pop(), lambda e: e.__setitem__(1, None),
    # More stretches than memory holds, had they been listed before they were counted.
    lambda e: (e.__setitem__(1, [2, 2**50]), e.__setitem__(2, 2**50), e.__setitem__(3, 1)),
    # More than eight times what is there.
    lambda e: e.__setitem__(4, [20_000 // 8 - 1] * len(e[4])),
])  # fmt: skip
def test_malformed_packings_are_refused(change: Callable[[list[Any]], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        entry = pack(pool, made((400, 50), torch.float32))[0].to_json()
    change(entry)
    with pytest.raises(CorruptContext):
        Packing.from_json("x", entry)


@pytest.mark.parametrize("data", [
    deflate(b"\0" * 50_000_000), deflate(b"x" * 999), deflate(b"x" * 1001), deflate(b"x" * 1000)[:-1],
    deflate(b"x" * 1000) + b"1", b"", b"\xff" * 50, zlib.compress(b"x" * 1000),
])  # fmt: skip
def test_streams_of_another_size_are_refused(data: bytes) -> None:
    import tracemalloc

    assert inflate("x", deflate(b"x" * 1000), 1000) == b"x" * 1000
    tracemalloc.start()
    with pytest.raises(CorruptContext):
        inflate("x", data, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, "a bomb was unpacked"


# Files.


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    with ThreadPoolExecutor(2) as pool:
        parts, written = packed_parts(pool, {"what": "a test"}, tensors)
        write_parts(folder / CONTEXT_TENSORS, parts)
    return facts_of(folder, written())


def facts_of(folder: Path, packed: Any) -> dict[str, Any]:
    return {"packed": packed, "files": {CONTEXT_TENSORS: {"sha256": sha256_file(folder / CONTEXT_TENSORS)}}}


def opened(folder: Path, facts: dict[str, Any]) -> PackedFile:
    header = read_header(folder / CONTEXT_TENSORS)
    return PackedFile(ContextFile(folder, facts, header.tensors, header.file_bytes))


def tensors() -> dict[str, torch.Tensor]:
    return {"large": made((300, 2, 200), torch.float32), "also": made((70_000,), torch.bfloat16),
            "small": made((3, 5), torch.float64), "scalar": torch.tensor(2)}  # fmt: skip


def test_files(tmp_path: Path) -> None:
    from safetensors import safe_open

    given = tensors()
    facts = write(tmp_path, given)
    # A plain safetensors file to any reader.
    with safe_open(tmp_path / CONTEXT_TENSORS, "pt") as handle:
        assert sorted(handle.keys()) == ["also", DESCRIPTION, "large"]
    assert facts["packed"]["tensors"] == sum(t.nbytes for t in given.values())
    header = read_header(tmp_path / CONTEXT_TENSORS)
    data = sum(t.nbytes for t in header.tensors.values())
    assert packed_bytes({"what": "a test"}, given) == data < facts["packed"]["tensors"]
    file = opened(tmp_path, facts)
    try:
        assert file.description == {"what": "a test"}
        assert same(file.take("small"), given["small"]) and same(file.take("large"), given["large"])
        with pytest.raises(CorruptContext, match="used twice"):
            file.take("small")
        with pytest.raises(CorruptContext, match="missing"):
            file.take("other")
        with pytest.raises(CorruptContext, match="'also' does not belong"):
            file.check_all_taken()
        assert same(file.take("also"), given["also"]) and file.take("scalar") == 2
        file.finish()
        file.check_all_taken()
    finally:
        file.close()


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    facts = write(tmp_path, tensors())
    path = tmp_path / CONTEXT_TENSORS
    raw = path.read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    for at in range(length, len(raw), (len(raw) - length) // 40):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        with pytest.raises(CorruptContext):
            file = opened(tmp_path, facts)
            try:
                for name in tensors():
                    file.take(name)
                file.finish()
            finally:
                file.close()


@pytest.mark.parametrize("packed, said", [
    (None, "missing"), ({}, "malformed"), ({"description": 5}, "malformed"),
    ({"description": -5, "small": 9}, "malformed"), ({"description": True, "small": 1}, "malformed"),
    ({"description": 2**33, "small": 0}, "over the limit"), ({"description": 0, "small": 0}, "over the limit"),
    ({"description": 10**8, "small": 0}, "does not hold"), ({"description": 3, "small": 1}, "does not hold"),
])  # fmt: skip
def test_claims_about_the_description_are_checked(tmp_path: Path, packed: Any, said: str) -> None:
    write(tmp_path, tensors())
    with pytest.raises(CorruptContext, match=said):
        opened(tmp_path, facts_of(tmp_path, packed))


@pytest.mark.parametrize("text", [
    b"[]", b"{}", b'{"small": {}}', b"{", b'{"small": {}, "packed": {"large": 1}}', b'{"small": [], "packed": []}',
    b'{"small": {"x": ["F32", [2]]}, "packed": {}}', b'{"small": {"x": ["F32", [-2]]}, "packed": {}}',
    b'{"small": {"x": ["Q9", [1]]}, "packed": {}}', b'{"small": {}, "packed": {}, "x": ' + b"[" * 90_000 + b"}",
    b'{"small": {}, "packed": {}}',
])  # fmt: skip
def test_crafted_descriptions(tmp_path: Path, text: bytes) -> None:
    facts = write(tmp_path, {"large": tensors()["large"]})
    redescribe(tmp_path / CONTEXT_TENSORS, deflate(text))
    with pytest.raises(CorruptContext):
        opened(tmp_path, facts_of(tmp_path, facts["packed"] | {"description": len(text), "small": 0}))


def test_descriptions_of_millions_of_items_are_not_parsed(tmp_path: Path) -> None:
    facts = write(tmp_path, {})
    text = b'{"small": {}, "packed": {}, "x": [' + b"[]," * 2_500_000 + b"1]}"
    redescribe(tmp_path / CONTEXT_TENSORS, deflate(text))
    with pytest.raises(CorruptContext, match="too many items"):
        opened(tmp_path, facts_of(tmp_path, facts["packed"] | {"description": len(text), "small": 0}))
