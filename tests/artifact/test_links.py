"""Directories as people have them: links, Hugging Face caches, files that were not fetched, other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import dense, edit_json, write_safetensors

from loadstone import detect, following_links
from loadstone.artifact.detect import examine
from loadstone.errors import ArtifactError, UsageError


def linked(tmp_path: Path) -> Path:
    """A model directory of links to files elsewhere."""
    store = dense(tmp_path / "store")
    folder = tmp_path / "local"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache of one model, whose ``blobs/`` is a link to another disk."""
    store = dense(tmp_path / "disk")
    root = tmp_path / "hub" / "models--o--n"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").symlink_to(store)
    for path in store.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return root


def test_links_need_the_flag(tmp_path: Path) -> None:
    folder = linked(tmp_path)
    with pytest.raises(ArtifactError, match=r"link that leaves the directory(?s:.)*--follow-links"):
        detect(folder)
    with following_links():
        assert detect(folder).kind == "dense"


def test_a_cache_whose_blobs_are_a_link(tmp_path: Path) -> None:
    assert detect(cache(tmp_path) / "snapshots" / "abc").kind == "dense"


def test_the_folder_of_a_repository_in_a_cache(tmp_path: Path) -> None:
    root = cache(tmp_path)
    assert detect(root).path == root / "snapshots" / "abc"
    (root / "snapshots" / "def").mkdir()
    with pytest.raises(UsageError, match=r"no snapshot(?s:.)*snapshots/abc"):
        detect(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert detect(root).path == root / "snapshots" / "abc"
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    with pytest.raises(UsageError, match="no snapshot"):
        detect(root)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_lfs_pointers(tmp_path: Path, name: str) -> None:
    folder = dense(tmp_path / "m")
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n")
    with pytest.raises(ArtifactError, match=rf"{name}: a git-LFS pointer(?s:.)*git lfs pull"):
        detect(folder)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["module.model.norm.weight", "module.lm_head.weight"], "DistributedDataParallel"),
        (["_orig_mod.model.norm.weight"], "torch.compile"),
        (["model.layers.0._orig_mod.norm.weight", "lm_head.weight"], "torch.compile"),
        (["model.q_proj.weight._data", "model.q_proj.weight._scale"], "quanto"),
    ],
)
def test_names_of_wrappers(tmp_path: Path, names: list[str], what: str) -> None:
    folder = dense(tmp_path / "m")
    write_safetensors(folder / "model.safetensors", {name: ("F32", [4]) for name in names})
    with pytest.raises(ArtifactError, match=what):
        detect(folder)


def test_mlx_and_modelopt(tmp_path: Path) -> None:
    folder = dense(tmp_path / "m")
    write_safetensors(
        folder / "model.safetensors", {"a.q_proj.weight": ("U32", [4]), "a.q_proj.scales": ("F16", [4])}
    )
    with pytest.raises(ArtifactError, match=r"mlx(?s:.)*mlx_lm.convert"):
        detect(folder)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"bits": 4, "group_size": 64}))
    with pytest.raises(ArtifactError, match=r"mlx(?s:.)*mlx_lm.convert"):
        detect(folder)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "modelopt"}))
    with pytest.raises(ArtifactError, match=r"ModelOpt(?s:.)*vLLM"):
        detect(folder)
    edit_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    write_safetensors(folder / "model.safetensors", {"a.weight": ("U8", [4]), "a.weight_scale": ("F32", [])})
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"ModelOpt(?s:.)*vLLM"):
        detect(folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model_world_size_2_rank_0.pt", "verl"),
        ("actor/model_world_size_2_rank_0.pt", "verl"),
        ("global_step_5/actor/model_world_size_2_rank_0.pt", "verl"),
        ("iter_0000005/mp_rank_00/x.pt", "Megatron"),
        ("x.nemo", "NeMo"),
        ("model_config.yaml", "NeMo"),
        ("last.ckpt", "Lightning"),
        ("weights.npz", "mlx"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_what_other_trainers_write(tmp_path: Path, name: str, what: str, with_config: bool) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ArtifactError, match=what):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"), [("last.ckpt", "Lightning"), ("x.nemo", "NeMo"), ("a.txt", "Name the")]
)
def test_a_file_where_a_directory_was_expected(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match=what):
        examine(tmp_path / name)
