"""Weight files and indexes: which files a load reads, and every disagreement between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import dense, edit_header, edit_json, torchao, write_safetensors

from loadstone.artifact.files import check_inside
from loadstone.artifact.formats.weights import find_weights, read_tensors
from loadstone.errors import ArtifactError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def read(directory: Path):
    weights = find_weights(directory)
    assert weights is not None
    return weights, read_tensors(directory, weights)


def test_single_and_sharded_hold_the_same_tensors(tmp_path: Path) -> None:
    _, one = read(dense(tmp_path / "one"))
    weights, two = read(dense(tmp_path / "two", shards=2))
    assert weights.files == (FIRST, SECOND) and weights.index == INDEX
    assert {n: (t.dtype, t.shape) for n, t in one.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in two.tensors.items()
    }
    assert weights.total_size == sum(t.nbytes for t in two.tensors.values())


def test_nothing_is_none(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None


def test_a_single_file_wins_over_a_stale_index_and_says_so(tmp_path: Path) -> None:
    directory = dense(dense(tmp_path / "m", shards=2))
    for shard in (FIRST, SECOND):
        (directory / shard).unlink()
    weights, _ = read(directory)
    assert weights.files == ("model.safetensors",)
    assert any("index.json is ignored" in note for note in weights.notes)


def test_a_foreign_file_beside_an_index_and_its_shards_is_refused(tmp_path: Path) -> None:
    directory = dense(dense(tmp_path / "m", shards=2))
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not named by .*index\.json"):
        find_weights(directory)


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m")
    (directory / "pytorch_model.bin").write_bytes(b"junk")
    assert read(directory)[0].format == "safetensors"


def test_strays_are_noted_and_training_state_is_not(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m", shards=2)
    for name in (
        "consolidated.safetensors",
        "optimizer.bin",
        "training_args.bin",
        "adapter_model.safetensors",
    ):
        (directory / name).write_bytes(b"x")
    (note,) = find_weights(directory).notes
    assert note == "consolidated.safetensors: not part of the model, ignored"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a valid JSON object"),
        ("{", "not a valid JSON object"),
        ("{}", "not a valid index"),
        ('{"weight_map": []}', "not a valid index"),
        ('{"weight_map": {"a": 1}}', "not a valid index"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"a": "../m/model.safetensors"}}', "leaves the directory"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "leaves the directory"),
        ('{"weight_map": {"a": ""}}', "leaves the directory"),
        ('{"weight_map": {"a": "."}}', "leaves the directory"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "leaves the directory"),
        ('{"weight_map": {"a": "\\ud800"}}', "leaves the directory"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "names 'absent.safetensors', which is not there"),
        ('{"weight_map": {"a": "' + "n" * 5000 + '"}}', "nnn"),
    ],
)
def test_bad_indexes(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ArtifactError) as caught:
        find_weights(tmp_path)
    assert words in caught.value.message and len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop(NORM), f"{SECOND}: tensor '{NORM}' is not in {INDEX}"),
        (lambda m: m.update(ghost=FIRST), f"{FIRST}: tensor 'ghost' is named by {INDEX} and is not in it"),
        (lambda m: m.update({NORM: FIRST}), f"puts '{NORM}' in {FIRST}, it is in {SECOND}"),
    ],
)
def test_the_index_is_held_against_the_shards(tmp_path: Path, change, words: str) -> None:
    directory = dense(tmp_path / "m", shards=2)
    edit_json(directory / INDEX, lambda index: change(index["weight_map"]))
    with pytest.raises(ArtifactError) as caught:
        read(directory)
    assert words in caught.value.message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m", shards=2)
    write_safetensors(
        directory / SECOND, {NORM: ("BF16", (64,)), "model.embed_tokens.weight": ("BF16", (32, 64))}
    )
    with pytest.raises(ArtifactError, match=r"'model.embed_tokens.weight' is in both .*00001.* and .*00002"):
        read(directory)


def test_all_problems_are_collected(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m", shards=2)
    edit_json(directory / INDEX, lambda i: i["weight_map"].update(a="gone.safetensors", ghost=FIRST))
    edit_json(directory / INDEX, lambda i: i["weight_map"].pop(NORM))
    problems: list[ArtifactError] = []
    weights = find_weights(directory, problems.append)
    assert weights is not None
    read_tensors(directory, weights, problems.append)
    text = "\n".join(p.message for p in problems)
    assert len(problems) == 3 and "gone.safetensors" in text and "'ghost'" in text and NORM in text


def test_metadata_of_shards_is_merged(tmp_path: Path) -> None:
    directory = torchao(tmp_path / "m", shards=2)
    # As a writer does that gives each shard only the description of its own tensors.
    for number, shard in enumerate((FIRST, SECOND)):

        def own(header: dict, number: int = number) -> None:
            described = {k: v for k, v in header["__metadata__"].items() if f"layers.{number}." in k}
            header["__metadata__"] = {"format": "pt", "tensor_names": json.dumps(list(described))} | described

        edit_header(directory / shard, own)
    _, table = read(directory)
    names = json.loads(table.metadata["tensor_names"])
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.1.mlp.up_proj.weight" in names


def test_metadata_that_differs_between_shards_is_refused(tmp_path: Path) -> None:
    directory = torchao(tmp_path / "m", shards=2)
    key = "model.layers.0.mlp.up_proj.weight"

    def change(header: dict) -> None:
        header["__metadata__"][key] = header["__metadata__"][key].replace("int4", "int8")

    edit_header(directory / SECOND, change)
    with pytest.raises(ArtifactError, match=f"{SECOND}: metadata of '{key}' differs between shards"):
        read(directory)


def test_links_may_not_leave_but_the_hugging_face_cache_works(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    source = dense(tmp_path / "source")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert read(snapshot)[0].files == ("model.safetensors",)
    (tmp_path / "link").symlink_to(snapshot)
    assert read(tmp_path / "link")[0].files == ("model.safetensors",)

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ArtifactError, match="link that leaves the directory"):
        find_weights(outside)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "real").write_bytes((source / "model.safetensors").read_bytes())
    (inside / "model.safetensors").symlink_to("real")
    assert find_weights(inside) is not None


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ArtifactError, match="loop of links"):
        check_inside(tmp_path, "a")


def test_subfolders_are_allowed(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m", shards=2)
    (directory / "sub").mkdir()
    (directory / FIRST).rename(directory / "sub" / FIRST)
    edit_json(
        directory / INDEX,
        lambda i: i.update(
            weight_map={k: v.replace(FIRST, f"sub/{FIRST}") for k, v in i["weight_map"].items()}
        ),
    )
    weights, table = read(directory)
    assert weights.files == (SECOND, f"sub/{FIRST}")
    assert table.tensors["model.embed_tokens.weight"].file == f"sub/{FIRST}"
