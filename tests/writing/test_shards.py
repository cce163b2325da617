"""Files written tensor by tensor are those of the reference writer; the division into files and its index."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.artifact import TensorInfo
from loadstone.artifact.torchao.flatten import dtype_name
from loadstone.writing.index import in_shards, shard_name, weights_name, write_index
from loadstone.writing.shards import ShardWriter, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "é": torch.arange(5, dtype=torch.int8),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(12, dtype=torch.int16).view(3, 4).t(),
}


@pytest.fixture
def reference(tmp_path: Path) -> bytes:
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "ref", metadata={"format": "pt"})
    return (tmp_path / "ref").read_bytes()


def test_tensors_in_one_call(tmp_path: Path, reference: bytes) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    assert (tmp_path / "file").read_bytes() == reference


def test_tensors_in_any_order_and_by_rows(tmp_path: Path, reference: bytes) -> None:
    infos = [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape), "", 0, t.nbytes) for n, t in TENSORS.items()]
    writer = ShardWriter(tmp_path / "file", infos, {"format": "pt"})
    with ThreadPoolExecutor(1) as pool:
        # Hashed while it is written, the last bytes first.
        digest = pool.submit(writer.digest)
        try:
            write_backwards(writer)
            writer.flush()
            assert digest.result(timeout=20) == hashlib.sha256(reference).hexdigest()
        finally:
            writer.close()  # A thread that still waits for bytes ends here.
    assert (tmp_path / "file").read_bytes() == reference


def write_backwards(writer: ShardWriter) -> None:
    for name, tensor in reversed(TENSORS.items()):
        if name == "b":
            writer.write(name, tensor[1:], tensor[:1].nbytes)
            tensor = tensor[:1]
        writer.write(name, tensor)


def test_a_file_that_is_not_complete_has_no_digest(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "file", [TensorInfo("a", "I8", (4,), "", 0, 4)], {})
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(writer.digest)
        writer.write("a", torch.ones(2, dtype=torch.int8))
        writer.close()
        with pytest.raises(ValueError, match="before it was complete"):
            digest.result(timeout=20)


def test_a_file_closes_when_the_next_tensor_would_overfill_it() -> None:
    items = [torch.empty(n, dtype=torch.int8) for n in (4, 6, 1, 20, 3, 3)]
    shards = in_shards(items, 10)
    assert [[t.nbytes for t in shard] for shard in shards] == [[4, 6], [1], [20], [3, 3]]
    assert in_shards([], 10) == ((),)


def test_names_and_index(tmp_path: Path) -> None:
    assert shard_name(0, 1) == "model-00001-of-00001.safetensors"
    assert weights_name(0, 1) == "model.safetensors" and weights_name(1, 3) == shard_name(1, 3)
    write_index(tmp_path, {"b": "two", "a": "one"}, 7)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    assert list(json.loads(text)["weight_map"]) == ["a", "b"]
    assert json.loads(text)["metadata"] == {"total_size": 7}
