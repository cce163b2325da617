"""Distributed checkpoints, written by torch itself in the shapes that FSDP and accelerate leave."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.helpers import logits, stock

import loadstone
from loadstone.errors import ArtifactError
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.quantization import parse_recipe

from .test_native import W4


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A run whose checkpoint-3 holds ``pytorch_model_fsdp_0/`` and whose config and tokenizer lie in the root."""
    import torch.distributed.checkpoint as dcp

    root = tmp_path / "run"
    shutil.copytree(tiny, root, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {k: v for k, v in stock(tiny).state_dict().items() if k != "lm_head.weight"}
    dcp.save({"model": state}, checkpoint_id=root / "checkpoint-3" / "pytorch_model_fsdp_0", no_dist=True)
    return root


def test_loads(run: Path, tiny: Path) -> None:
    assert loadstone.detect(run).weights.format == "dcp"
    assert torch.equal(logits(loadstone.load(run)), logits(stock(tiny)))


@pytest.mark.parametrize("recipe", [None, W4])
def test_finalizes(run: Path, tiny: Path, quantize_to, tmp_path: Path, recipe: str | None) -> None:
    out = tmp_path / "out"
    write_plan(make_plan(loadstone.detect(run), parse_recipe(recipe) if recipe else None), out)
    reference = quantize_to(tiny, recipe) if recipe else tiny
    assert torch.equal(logits(loadstone.load(out)), logits(loadstone.load(reference)))
    assert (out / "tokenizer.json").is_file()


def test_a_damaged_slice_is_named(run: Path) -> None:
    (data,) = (run / "checkpoint-3").rglob("*.distcp")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 4000] = b"\xff" * 4000
    data.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"distcp: the slice of 'model\.|NaN"):
        loadstone.load(run)


def test_slices_that_are_links_are_followed_in_threads(run: Path, tiny: Path, tmp_path: Path) -> None:
    """Slices are read in other threads than the one that asked to follow links: the artifact carries the answer."""
    for path in sorted(run.rglob("*")):
        if path.is_file() or path.is_symlink():
            elsewhere = tmp_path / "store" / path.relative_to(run)
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            path.rename(elsewhere)
            path.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="--follow-links"):
        loadstone.detect(run)
    with loadstone.following_links():
        artifact = loadstone.detect(run)
        loadstone.finalize(artifact, tmp_path / "within", recipe=W4, verify=True)
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(loadstone.load, artifact).result()
        pool.submit(loadstone.finalize, artifact, tmp_path / "after", recipe=W4).result()
        pool.submit(loadstone.export_fakequant, artifact, tmp_path / "export", format="fp8").result()
    assert torch.equal(logits(model), logits(stock(tiny)))
    assert (tmp_path / "after" / "tokenizer.json").is_file() and (
        tmp_path / "export" / "tokenizer.json"
    ).is_file()
    for name in ("within", "after"):
        assert torch.equal(logits(loadstone.load(tmp_path / name)), logits(stock(tmp_path / "within")))
    with pytest.raises(ArtifactError, match="--follow-links"):
        loadstone.detect(run)
