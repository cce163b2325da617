"""Hostile directories: each is refused with exit code 3, in bounded time and memory, and runs nothing.

Every attack gets a process of its own, held to one gigabyte of address space and ten seconds of CPU time,
that first asks the library for a load plan and then inspects the directory.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))

from builders import (
    CONFIG,
    INTX,
    TORCHAO_BLOCK,
    dense,
    edit_header,
    edit_json,
    torchao,
    write_raw,
    write_safetensors,
)

MEMORY = 1_000_000_000
SECONDS = 10
NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"

ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {}


def attack(words: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Enter a builder of a hostile directory into the table, with words that its refusal must hold."""

    def enter(build: Callable[[Path], Any]) -> Callable[[Path], Any]:
        ATTACKS[build.__name__] = (build, words)
        return build

    return enter


# Leaving the directory


def index(directory: Path, weight_map: dict[str, str]) -> None:
    dense(directory, shards=2)
    edit_json(directory / "model.safetensors.index.json", lambda i: i["weight_map"].update(weight_map))


@attack("leaves the directory")
def index_with_dots(d: Path) -> None:
    index(d, {NORM: "../secret.safetensors"})


@attack("leaves the directory")
def index_with_dots_inside(d: Path) -> None:
    index(d, {NORM: "a/../../secret.safetensors"})


@attack("leaves the directory")
def index_with_an_absolute_path(d: Path) -> None:
    index(d, {NORM: "/etc/passwd"})


@attack("leaves the directory")
def index_with_backslashes(d: Path) -> None:
    index(d, {NORM: "..\\secret.safetensors"})


@attack("leaves the directory")
def index_with_nul(d: Path) -> None:
    index(d, {NORM: "model\0.safetensors"})


@attack("leaves the directory")
def index_with_escape_sequences(d: Path) -> None:
    index(d, {NORM: "\x1b]0;owned\x07.safetensors"})


@attack("which is not there")
def index_with_a_long_name(d: Path) -> None:
    index(d, {NORM: "n" * 100_000})


@attack("link that leaves the directory")
def shard_that_links_outside(d: Path) -> None:
    secret = dense(d.parent / "secret", shards=2)
    dense(d, shards=2)
    (d / "model-00002-of-00002.safetensors").unlink()
    (d / "model-00002-of-00002.safetensors").symlink_to(secret / "model-00002-of-00002.safetensors")


@attack("link that leaves the directory")
def weights_that_link_to_a_system_file(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    (d / "model.safetensors").symlink_to("/etc/passwd")


@attack("link that leaves the directory")
def config_that_links_outside(d: Path) -> None:
    dense(d.parent / "other")
    dense(d)
    (d / "config.json").unlink()
    (d / "config.json").symlink_to(d.parent / "other" / "config.json")


@attack("link that leaves the directory")
def folder_that_links_outside(d: Path) -> None:
    secret = dense(d.parent / "secret")
    index(d, {NORM: "sub/model.safetensors"})
    (d / "sub").symlink_to(secret)


@attack("loop of links")
def shards_that_link_in_a_loop(d: Path) -> None:
    index(d, {NORM: "loop-a.safetensors"})
    (d / "loop-a.safetensors").symlink_to("loop-b.safetensors")
    (d / "loop-b.safetensors").symlink_to("loop-a.safetensors")


# Files that are none


@attack("no weights")
def weights_that_are_a_directory(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    (d / "model.safetensors").mkdir()


@attack("no weights")
def weights_that_are_a_fifo(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    os.mkfifo(d / "model.safetensors")


@attack("no weights")
def weights_that_are_a_device(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    (d / "model.safetensors").symlink_to("/dev/zero")


@attack("which is not there")
def shard_that_is_a_fifo(d: Path) -> None:
    dense(d, shards=2)
    (d / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(d / "model-00002-of-00002.safetensors")


@attack("not a regular file")
def config_that_is_a_directory(d: Path) -> None:
    dense(d)
    (d / "config.json").unlink()
    (d / "config.json").mkdir()


@attack("not a regular file")
def config_that_is_a_fifo(d: Path) -> None:
    dense(d)
    (d / "config.json").unlink()
    os.mkfifo(d / "config.json")


@attack("not a regular file")
def config_that_is_a_device(d: Path) -> None:
    dense(d)
    (d / "config.json").unlink()
    (d / "config.json").symlink_to("/dev/zero")


# Sizes that lie


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@attack("config.json: 1073741824 bytes, over the limit")
def config_of_a_gigabyte(d: Path) -> None:
    dense(d)
    sparse(d / "config.json", 2**30)


@attack("model.safetensors.index.json: 1099511627776 bytes, over the limit")
def index_of_a_terabyte(d: Path) -> None:
    dense(d, shards=2)
    sparse(d / "model.safetensors.index.json", 2**40)


@attack("header claims 1152921504606846976 bytes")
def header_of_an_exabyte(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b"{}", length=2**60)


@attack("over the limit of 100000000")
def header_of_100_megabytes_and_one(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b"{}", length=100_000_001)
    os.truncate(d / "model.safetensors", 200_000_000)


@attack("not valid JSON")
def header_of_90_megabytes_of_zeros(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b"", length=90_000_000)
    os.truncate(d / "model.safetensors", 100_000_000)


@attack("over 4000000 items")
def header_of_empty_lists(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b'{"a":[' + b"[]," * 30_000_000 + b"0]}")


@attack("malformed header entry")
def header_of_empty_entries(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b"{" + b",".join(b'"%06x":{}' % n for n in range(400_000)) + b"}")


@attack("model.safetensors.index.json: not a valid JSON object")
def index_of_empty_lists(d: Path) -> None:
    dense(d, shards=2)
    (d / "model.safetensors.index.json").write_bytes(b'{"weight_map":[' + b"[]," * 30_000_000 + b"0]}")


@attack("truncated")
def tensor_of_a_terabyte_in_a_small_file(d: Path) -> None:
    dense(d)
    size = 2**40
    entry = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    write_raw(d / "model.safetensors", json.dumps(entry).encode())


@attack("holds 0 bytes")
def shape_that_overflows(d: Path) -> None:
    dense(d)
    entry = {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}
    write_raw(d / "model.safetensors", json.dumps(entry).encode())


@attack("malformed header entry")
def shape_of_ten_thousand_digits(d: Path) -> None:
    dense(d)
    digits = "9" * 4000
    header = f'{{"a":{{"dtype":"U8","shape":[{digits}],"data_offsets":[0,{digits}]}}}}'
    write_raw(d / "model.safetensors", header.encode())


@attack("malformed header entry")
def shape_of_a_hundred_thousand_dimensions(d: Path) -> None:
    dense(d)
    entry = {"a": {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 4]}}
    write_raw(d / "model.safetensors", json.dumps(entry).encode())


@attack("malformed header entry")
def negative_offsets(d: Path) -> None:
    dense(d)
    edit_header(d / "model.safetensors", lambda h: h[NORM].update(data_offsets=[-128, 0]))


@attack("overlaps another tensor")
def overlapping_offsets(d: Path) -> None:
    dense(d)
    edit_header(d / "model.safetensors", lambda h: h[NORM].update(data_offsets=[0, 128]))


@attack("unknown dtype")
def dtype_from_nowhere(d: Path) -> None:
    dense(d)
    edit_header(d / "model.safetensors", lambda h: h[NORM].update(dtype="__class__"))


# JSON that hurts

DEEP = b"[" * 200_000 + b"]" * 200_000


@attack("config.json: not a valid JSON object")
def deep_config(d: Path) -> None:
    dense(d)
    (d / "config.json").write_bytes(b'{"model_type":"llama","x":' + DEEP + b"}")


@attack("model.safetensors.index.json: not a valid JSON object")
def deep_index(d: Path) -> None:
    dense(d, shards=2)
    (d / "model.safetensors.index.json").write_bytes(b'{"weight_map":' + DEEP + b"}")


@attack("header is not valid JSON")
def deep_header(d: Path) -> None:
    dense(d)
    write_raw(d / "model.safetensors", b'{"a":' + DEEP + b"}")


@attack("is malformed")
def deep_tensor_description(d: Path) -> None:
    torchao(d)
    text = '{"_type": "Int8Tensor", "_data": ' + DEEP.decode() + "}"
    edit_header(d / "model.safetensors", lambda h: h["__metadata__"].update({UP: text}))


@attack("is duplicated")
def duplicate_names_in_a_header(d: Path) -> None:
    dense(d)
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    write_raw(d / "model.safetensors", f'{{"a": {entry}, "a": {entry}}}'.encode(), b"\0")


@attack("unprintable characters")
def tensor_name_that_writes_to_the_terminal(d: Path) -> None:
    dense(d)
    edit_header(d / "model.safetensors", lambda h: h.update({"\x1b[2J": h.pop(NORM)}))


# Pickles


class Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def bin_file(d: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    with zipfile.ZipFile(d / "pytorch_model.bin", "w", compression) as archive:
        archive.writestr("m/data.pkl", content)


def mark(d: Path) -> Path:
    return d.parent / "executed"


@attack("would call posix.system")
def pickle_that_calls_system(d: Path) -> None:
    bin_file(d, pickle.dumps({"a": Call(os.system, f"touch {mark(d)}")}, 2))


@attack("would call builtins.eval")
def pickle_that_calls_eval(d: Path) -> None:
    bin_file(d, pickle.dumps({"a": Call(eval, f"open({str(mark(d))!r}, 'w')")}, 4))


@attack("would call torch.hub.load")
def pickle_that_calls_into_torch(d: Path) -> None:
    bin_file(d, b"\x80\x02}X\x01\x00\x00\x00actorch.hub\nload\n(X\x01\x00\x00\x00xtRs.")


@attack("would call posix.system")
def distributed_checkpoint_that_calls_system(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    (d / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {mark(d)}"), 4))


@attack("holds no state dict")
def pickle_with_a_huge_memo_index(d: Path) -> None:
    # The standard unpickler allocates a slot for every index up to this one: 34 GB.
    bin_file(d, b"\x80\x02]r\xff\xff\xff\xff.")


@attack("holds no state dict")
def pickle_of_a_billion_laughs(d: Path) -> None:
    data = b"\x80\x02]q\x00"
    for number in range(60):
        data += b"]q" + bytes([number + 1]) + b"(h" + bytes([number]) + b"h" + bytes([number]) + b"e"
    bin_file(d, data + b".")


@attack("malformed")
def pickle_without_end(d: Path) -> None:
    bin_file(d, b"\x80\x02" + b"(" * 1_000_000)


@attack("over the limit")
def bin_that_is_a_zip_bomb(d: Path) -> None:
    bin_file(d, bytes(500_000_000), zipfile.ZIP_DEFLATED)


@attack("pytorch_model.bin")
def bin_with_a_lying_size(d: Path) -> None:
    bin_file(d, bytes(60_000_000), zipfile.ZIP_DEFLATED)
    raw = bytearray((d / "pytorch_model.bin").read_bytes())
    for signature, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        struct.pack_into("<I", raw, raw.find(signature) + at, 100)
    (d / "pytorch_model.bin").write_bytes(raw)


@attack("zip directory claims")
def bin_with_a_huge_directory(d: Path) -> None:
    bin_file(d, b".")
    raw = bytearray((d / "pytorch_model.bin").read_bytes())
    struct.pack_into("<I", raw, raw.rfind(b"PK\5\6") + 12, 2**31)
    (d / "pytorch_model.bin").write_bytes(raw)


@attack("zip directory claims 4294967196 bytes")
def bin_with_a_huge_directory_behind_a_small_one(d: Path) -> None:
    """zipfile obeys a zip64 record whatever the end record after it says."""
    dense(d)
    (d / "model.safetensors").unlink()
    size = 2**32
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size - 100, 50)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, size, 1)
    with (d / "pytorch_model.bin").open("wb") as file:
        file.seek(size)
        file.write(record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 100, 0, 0))


@attack("malformed")
def name_of_nested_tuples(d: Path) -> None:
    nested = b"\x80\x04)" + b"".join(b"q\x00h\x00h\x00\x86" for _ in range(60))
    bin_file(d, nested + b"h\x00\x93.")


@attack("malformed")
def integer_of_a_million_digits(d: Path) -> None:
    bin_file(d, b"\x80\x04\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b".")


@attack("malformed")
def pickle_of_millions_of_dicts(d: Path) -> None:
    bin_file(d, b"\x80\x04" + b"}" * 30_000_000 + b".", zipfile.ZIP_DEFLATED)


@attack("too many containers and names")
def distributed_checkpoint_of_millions_of_dicts(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    (d / ".metadata").write_bytes(b"\x80\x04" + b"}" * 60_000_000 + b".")


@attack("malformed")
def pickle_of_a_million_names(d: Path) -> None:
    bin_file(d, b"\x80\x04" + b"ca\nb\n" * 5_000_000 + b".")


def entries_of(d: Path, names: list[str], compression: int) -> None:
    bin_file(d, b"\x80\x02}.")
    with zipfile.ZipFile(d / "pytorch_model.bin", "a", compression) as archive:
        for name in names:
            archive.writestr(name, bytes(100))


@attack("compressed or repeated entries")
def bin_with_compressed_storages(d: Path) -> None:
    entries_of(d, ["m/data/0"], zipfile.ZIP_DEFLATED)


@attack("compressed or repeated entries")
def bin_with_a_storage_twice(d: Path) -> None:
    entries_of(d, ["m/data/0", "m/data/0"], zipfile.ZIP_STORED)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def wrapper(name: str, state: bytes) -> bytes:
    """The pickle of one entry of a state dict: a torchao tensor whose attributes are ``state``."""
    calls = b"ctorch._utils\n_rebuild_wrapper_subclass\nctorchao.quantization\nInt8Tensor\n"
    return text(name) + b"ctorch._tensor\n_rebuild_from_type_v2\n(" + calls + b"K\1K\2K\3\x87" + state + b"tR"


@attack("claims 30000 attributes")
def attributes_shared_by_many_tensors(d: Path) -> None:
    shared = b"}(" + b"".join(text(f"k{n}") + b"N" for n in range(30_000)) + b"uq\1"
    entries = wrapper("w0", shared) + b"".join(wrapper(f"w{n}", b"h\1") for n in range(1, 30_000))
    bin_file(d, b"\x80\2}(" + entries + b"u.")


@attack("lacks the attribute block_size")
def quantized_tensor_in_a_bin_without_its_parts(d: Path) -> None:
    bin_file(d, b"\x80\2}(" + wrapper("a", b"}") + b"u.")


@attack("lacks the part qdata")
def attributes_nested_deeper_than_python_recurses(d: Path) -> None:
    state = b"}" + text("block_size") + b"N" + b"\x85" * 5000 + b"s" + text("dtype") + b"Ns"
    bin_file(d, b"\x80\2}(" + wrapper("a", state) + b"u.")


@attack("unprintable characters")
def tensor_name_in_a_bin_that_writes_to_the_terminal(d: Path) -> None:
    bin_file(d, b"\x80\2}(" + text("\x1b[2J") + b"N" + text("a") + b"Nu.")


@attack("from before 1.6")
def bin_of_zeros(d: Path) -> None:
    dense(d)
    (d / "model.safetensors").unlink()
    sparse(d / "pytorch_model.bin", 2**40)


# Names that would be looked up and called


@attack("auto_map asks to run Python code")
def remote_code(d: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    dense(d, config=CONFIG | {"auto_map": auto_map, "architectures": ["Model"]})
    (d / "evil.py").write_text(f"open({str(mark(d))!r}, 'w')")


def block(config: Any) -> dict[str, Any]:
    return CONFIG | {"quantization_config": TORCHAO_BLOCK | {"quant_type": {"default": config}}}


@attack("names 'quantize_', no torchao configuration")
def block_that_names_a_function(d: Path) -> None:
    torchao(d, config=block({"_type": "quantize_", "_data": {"model": "x"}}))


@attack("names 'importlib', no torchao configuration")
def block_that_names_a_module_within(d: Path) -> None:
    inner = {"_type": "importlib", "_data": {"name": "evil"}}
    torchao(d, config=block({"_type": "Int8WeightOnlyConfig", "_data": {"granularity": [{"x": inner}]}}))


@attack("names 'torch.load', no torchao configuration")
def block_whose_dtype_is_a_function(d: Path) -> None:
    dtype = {"_type": "torch.dtype", "_data": "load"}
    torchao(d, config=block({"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": dtype}}))


@attack("unknown quantized class 'Popen'")
def tensor_of_a_foreign_class(d: Path) -> None:
    torchao(d)
    text = json.dumps(INTX | {"_type": "Popen"})
    edit_header(d / "model.safetensors", lambda h: h["__metadata__"].update({UP: text}))


@attack("names 'torch.load', no part of a tensor")
def tensor_whose_dtype_is_a_function(d: Path) -> None:
    torchao(d)
    text = json.dumps(INTX).replace('"int4"', '"load"')
    edit_header(d / "model.safetensors", lambda h: h["__metadata__"].update({UP: text}))


@attack("no part of a tensor")
def tensor_with_a_foreign_attribute(d: Path) -> None:
    torchao(d)
    text = json.dumps(INTX | {"_data": INTX["_data"] | {"dtype": {"_type": "os.system", "_data": "sh"}}})
    edit_header(d / "model.safetensors", lambda h: h["__metadata__"].update({UP: text}))


# Training runs and crowds


@attack("not a checkpoint")
def best_checkpoint_elsewhere(d: Path) -> None:
    dense(d.parent / "secret")
    dense(d / "checkpoint-1")
    (d / "trainer_state.json").write_text('{"best_model_checkpoint": "/x/../secret/.."}')


@attack("trainer_state.json: 1099511627776 bytes, over the limit")
def trainer_state_of_a_terabyte(d: Path) -> None:
    dense(d / "checkpoint-1")
    sparse(d / "trainer_state.json", 2**40)


@attack("no weights")
def thousands_of_empty_files(d: Path) -> None:
    d.mkdir()
    (d / "config.json").write_text(json.dumps(CONFIG))
    for number in range(3_000):
        (d / f"checkpoint-{number}x").touch()


@attack("names over 10000 files")
def index_of_too_many_files(d: Path) -> None:
    index(d, {f"t{n}": f"model-{n}.safetensors" for n in range(10_001)})


@attack("is in both")
def one_tensor_in_many_shards(d: Path) -> None:
    dense(d, shards=2)
    names = [f"extra-{n}.safetensors" for n in range(200)]
    for name in names:
        write_safetensors(d / name, {"same": ("U8", (1,))}, {"format": "pt"})
    weight_map = {f"t{n}": name for n, name in enumerate(names)}
    edit_json(d / "model.safetensors.index.json", lambda i: i["weight_map"].update(weight_map))


PROBE = """
import sys
from loadstone import plan
from loadstone.cli import main
from loadstone.errors import ArtifactError
try:
    plan(sys.argv[1], checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
except ArtifactError as error:
    print("REFUSED", ascii(str(error)), file=sys.stderr)
sys.argv[2:] = ["--checkpoint", *sys.argv[2:]] if len(sys.argv) > 2 else []
main(["inspect", sys.argv[1], "--json", *sys.argv[2:]])
"""


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(tmp_path: Path, name: str) -> None:
    build, words = ATTACKS[name]
    build(tmp_path / "hostile")
    best = ["best"] if (tmp_path / "hostile" / "checkpoint-1").exists() else []
    command = [sys.executable, "-c", PROBE, str(tmp_path / "hostile"), *best]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=_limits)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "REFUSED" in done.stderr and done.returncode == 3, (done.returncode, done.stderr[-2000:])
    messages = [p["message"] + p["remedy"] for p in json.loads(done.stdout)["problems"]]
    assert any(words in m for m in messages) and words in done.stderr.replace("\\'", "'"), messages
    assert all(m.isprintable() and len(m) < 2000 for m in messages)
    assert not (tmp_path / "executed").exists()


def test_there_are_no_two_of_a_name() -> None:
    source = Path(__file__).read_text()
    assert source.count("\n@attack(") == len(ATTACKS)
