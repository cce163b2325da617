"""Training runs of every form: which checkpoint is read, where its config lies, what a sharded one holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import CONFIG, dense

from loadstone import detect
from loadstone.artifact.training_run import checkpoints, choose_checkpoint
from loadstone.errors import ArtifactError, UsageError


def run(root: Path, steps: tuple[int, ...] = (90, 100, 1000), best: int | None = None) -> Path:
    for step in steps:
        dense(root / f"checkpoint-{step}")
        (root / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"junk")
    if best is not None:
        state = {"best_model_checkpoint": f"C:\\elsewhere\\out/checkpoint-{best}", "best_metric": 1.5}
        (root / f"checkpoint-{steps[-1]}" / "trainer_state.json").write_text(json.dumps(state))
    return root


def test_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    artifact = detect(run(tmp_path / "run"))
    assert artifact.path.name == "checkpoint-1000" and artifact.root.name == "run"
    assert artifact.evidence[0] == "training run with 3 checkpoints: newest is checkpoint-1000"


def test_a_checkpoint_still_being_written_is_passed_over(tmp_path: Path) -> None:
    root = run(tmp_path / "run")
    (root / "checkpoint-2000").mkdir()
    (root / "checkpoint-2000" / "optimizer.pt").write_bytes(b"")
    assert detect(root).path.name == "checkpoint-1000"


def test_the_final_model_of_a_run_wins_over_its_checkpoints(tmp_path: Path) -> None:
    root = run(tmp_path / "run")
    dense(root)
    assert detect(root).path == root
    assert detect(root, checkpoint="newest").path.name == "checkpoint-1000"


def test_best(tmp_path: Path) -> None:
    root = run(tmp_path / "run", best=90)
    artifact = detect(root, checkpoint="best")
    assert artifact.path.name == "checkpoint-90" and "is best (1.5)" in artifact.evidence[0]
    shutil.rmtree(root / "checkpoint-90")
    with pytest.raises(ArtifactError, match="checkpoint-90, is no longer in"):
        detect(root, checkpoint="best")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{}", "says which checkpoint is best"),
        ('{"best_model_checkpoint": null}', "says which checkpoint is best"),
        ('{"best_model_checkpoint": 7}', "says which checkpoint is best"),
        ('{"best_model_checkpoint": "/a/b/.."}', "not a checkpoint"),
        ('{"best_model_checkpoint": "../../etc"}', "not a checkpoint"),
        ("[1]", "trainer_state.json: not a valid JSON object"),
        ("[" * 100_000, "trainer_state.json: not a valid JSON object"),
    ],
)
def test_odd_trainer_states(tmp_path: Path, state: str, words: str) -> None:
    root = run(tmp_path / "run")
    (root / "trainer_state.json").write_text(state)
    with pytest.raises(ArtifactError, match=words):
        detect(root, checkpoint="best")


@pytest.mark.parametrize("choice", ["100", "checkpoint-100"])
def test_choices(tmp_path: Path, choice: str) -> None:
    artifact = detect(run(tmp_path / "run"), checkpoint=choice)
    assert (
        artifact.path.name == "checkpoint-100"
        and artifact.evidence[0] == "checkpoint checkpoint-100, as asked"
    )


def test_a_choice_may_be_a_path(tmp_path: Path) -> None:
    root = run(tmp_path / "run")
    assert detect(root, checkpoint=str(root / "checkpoint-90")).path.name == "checkpoint-90"
    with pytest.raises(UsageError, match=r"no checkpoint '7'.*checkpoint-100, checkpoint-1000"):
        detect(root, checkpoint="7")
    with pytest.raises(UsageError, match="has no checkpoint-N folder"):
        detect(dense(tmp_path / "plain"), checkpoint="newest")


def test_names_of_other_trainers(tmp_path: Path) -> None:
    for name in ("checkpoints/checkpoint_0", "checkpoints/checkpoint_12"):
        dense(tmp_path / "accelerate" / name)
    assert detect(tmp_path / "accelerate").path.name == "checkpoint_12"
    assert detect(tmp_path / "accelerate", checkpoint="0").path.name == "checkpoint_0"
    dense(tmp_path / "titan" / "step-5")
    assert detect(tmp_path / "titan").path.name == "step-5"


def test_no_weights_anywhere(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"no checkpoint in .* holds weights"):
        detect(tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert choose_checkpoint(tmp_path, None) == (tmp_path, ())


@pytest.mark.parametrize("named", ["run", "run/checkpoint-1000"])
def test_the_config_may_lie_in_the_root_of_the_run(tmp_path: Path, named: str) -> None:
    root = run(tmp_path / "run")
    for folder in checkpoints(root):
        (folder / "config.json").unlink()
    (root / "config.json").write_text(json.dumps(CONFIG))
    artifact = detect(tmp_path / named)
    assert artifact.path.name == "checkpoint-1000" and artifact.config == CONFIG
    assert "config.json is the run's, run/config.json" in artifact.evidence
    assert artifact.sidecar_dirs == (artifact.path, root) and artifact.config_dir == root
    assert len(artifact.fingerprint()) == 64


# Sharded checkpoints, against ones that torch wrote.

torch = pytest.importorskip("torch")


def save_dcp(folder: Path, state: dict) -> None:
    import torch.distributed.checkpoint as dcp

    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state, checkpoint_id=folder, no_dist=True)


STATE = {
    "model.embed_tokens.weight": ("BF16", (8, 4)),
    "model.norm.weight": ("F32", (4,)),
    "model.position_ids": ("I64", (1, 6)),
}


def tensors() -> dict:
    names = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    return {n: torch.ones(shape, dtype=names[dtype]) for n, (dtype, shape) in STATE.items()}


@pytest.fixture
def fsdp(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "run" / "checkpoint-5"
    save_dcp(checkpoint / "pytorch_model_fsdp_0", {"model": tensors()})
    save_dcp(checkpoint / "optimizer_0", {"optimizer": {"state.exp_avg": torch.zeros(3)}})
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "run"


def test_an_fsdp_checkpoint_of_accelerate(fsdp: Path) -> None:
    artifact = detect(fsdp)
    assert artifact.kind == "dense" and artifact.path.name == "checkpoint-5"
    assert artifact.weights.format == "dcp" and artifact.weights.folder == "pytorch_model_fsdp_0"
    assert artifact.evidence[-1] == "pytorch_model_fsdp_0/.metadata describes a torch distributed checkpoint"
    dcp = artifact.source.contents
    assert {n: (t.dtype, t.shape) for n, t in artifact.tensors.items()} == STATE
    assert dcp.keys["model.norm.weight"] == "model.model.norm.weight"
    assert dcp.files == ("pytorch_model_fsdp_0/__0_0.distcp",)


def test_its_slices_are_where_it_says(fsdp: Path) -> None:
    import io

    artifact = detect(fsdp)
    dcp = artifact.source.contents
    for name, expected in tensors().items():
        (chunk,) = dcp.chunks[name]
        raw = (artifact.path / chunk.file).read_bytes()[chunk.begin : chunk.end]
        assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True), expected)
        assert chunk.sizes == tuple(expected.shape) and chunk.offsets == (0,) * expected.ndim


def test_a_bare_distributed_checkpoint_with_its_optimizer(tmp_path: Path) -> None:
    save_dcp(tmp_path / "m", {"state_dict": tensors(), "optimizer": {"lr": torch.ones(1)}, "step": 4})
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    artifact = detect(tmp_path / "m")
    assert set(artifact.tensors) == set(STATE)
    save_dcp(tmp_path / "flat", tensors())
    (tmp_path / "flat" / "config.json").write_text(json.dumps(CONFIG))
    flat = detect(tmp_path / "flat")
    assert set(flat.tensors) == set(STATE)


def test_a_full_state_dict_of_fsdp(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors(), tmp_path / "pytorch_model_fsdp.bin")
    artifact = detect(tmp_path)
    assert artifact.weights.format == "bin" and set(artifact.tensors) == set(STATE)


def test_damaged_distributed_checkpoints(fsdp: Path) -> None:
    folder = fsdp / "checkpoint-5" / "pytorch_model_fsdp_0"
    data, metadata = (folder / "__0_0.distcp").read_bytes(), (folder / ".metadata").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-10])
    with pytest.raises(ArtifactError, match=r"__0_0\.distcp: truncated"):
        detect(fsdp)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(ArtifactError, match=r"__0_0\.distcp: missing, it holds 'model\."):
        detect(fsdp)
    (folder / "__0_0.distcp").write_bytes(data)
    for bad, words in (
        (metadata[:-40], r"\.metadata: cannot be read"),
        (b"\x80\x04}.", "not the metadata of a distributed"),
        (b"\x80\x02cposix\nsystem\n(X\x01\x00\x00\x00ltR.", r"would call posix\.system"),
        (metadata.replace(b"__0_0.distcp", b"../../x.bin."), "leaves the directory"),
    ):
        (folder / ".metadata").write_bytes(bad)
        with pytest.raises(ArtifactError, match=words):
            detect(fsdp)


def sharded(folder: Path, offsets: tuple[int, ...] = (0, 3), compress: bool = False) -> Path:
    """A tensor of five rows in two files, as two ranks would have left it."""
    import pickle

    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    chunks, storage = [], {}
    for rank, (start, rows) in enumerate(zip(offsets, (3, 2), strict=True)):
        name = f"__{rank}_0.distcp"
        torch.save(torch.full((rows, 4), float(rank), dtype=torch.bfloat16), folder / name)
        chunks.append(ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([rows, 4])))
        index = MetadataIndex("w", torch.Size([start, 0]), rank)
        storage[index] = _StorageInfo(name, 0, (folder / name).stat().st_size, ["zstd"] if compress else None)
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([5, 4]), chunks)
    metadata = Metadata({"w": tensor}, {"w": ("w",)}, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_slices_of_several_ranks(tmp_path: Path) -> None:
    artifact = detect(sharded(tmp_path / "m"))
    dcp = artifact.source.contents
    assert artifact.tensors["w"].shape == (5, 4) and artifact.tensors["w"].nbytes == 40
    assert [(c.file, c.offsets, c.sizes) for c in dcp.chunks["w"]] == [
        ("__0_0.distcp", (0, 0), (3, 4)),
        ("__1_0.distcp", (3, 0), (2, 4)),
    ]
    (tmp_path / "m" / "__1_0.distcp").unlink()
    with pytest.raises(ArtifactError, match=r"__1_0\.distcp: missing, it holds 'w'"):
        detect(tmp_path / "m")


def test_slices_that_do_not_make_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a slice of 'w' lies outside of it"):
        detect(sharded(tmp_path / "outside", (0, 4)))
    with pytest.raises(ArtifactError, match="slices of 'w' hold"):
        detect(sharded(tmp_path / "twice", (0, 0)))
    # As many elements as the tensor has, one row of them twice and the last row nowhere.
    with pytest.raises(ArtifactError, match="slices of 'w' hold 20 elements and do not make up its 20"):
        detect(sharded(tmp_path / "overlapping", (0, 2)))
    with pytest.raises(ArtifactError, match="compressed or encrypted"):
        detect(sharded(tmp_path / "zstd", compress=True))


def test_a_newest_checkpoint_without_weights_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = run(tmp_path / "run")
    (root / "checkpoint-2000").mkdir()
    assert detect(root).path.name == "checkpoint-1000"
    assert "checkpoint-2000: passed over, no weights in it; reading checkpoint-1000" in caplog.text


@pytest.mark.parametrize("choice", [None, "newest", "2000"])
def test_a_checkpoint_that_links_out_of_the_run_is_not_followed(tmp_path: Path, choice: str | None) -> None:
    root, other = run(tmp_path / "run"), dense(tmp_path / "other")
    (root / "checkpoint-2000").symlink_to(other)
    with pytest.raises(ArtifactError, match="link that leaves the directory"):
        detect(root, checkpoint=choice)
