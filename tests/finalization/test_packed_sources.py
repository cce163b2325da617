"""Sources in the formats of other quantizers: what is written is what a plain source with their values gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import packed
from tests.helpers import on_ranks, run, stock
from tests.mixtures import save_mixture

import loadstone
from loadstone.errors import ArtifactError
from loadstone.fakequant import export_fakequant
from loadstone.finalization import units
from loadstone.finalization.run import write_plan

from .test_finalize import weights

W4, W8 = "intx4-weight-only", "int8-weight-only"


def served(family: str, out: Path, recipe: str) -> Path:
    """A mixture in the layout of serving engines."""
    source = save_mixture(
        family, out / "plain", hidden_size=128, intermediate_size=64, tie_word_embeddings=False
    )
    return loadstone.finalize(source, out / "packed", recipe=recipe, layout="compressed-tensors").out


SOURCES: dict[str, Callable[[Path], Path]] = {
    "fp8 block": lambda out: packed.fp8(packed.save_model("qwen3-moe", out / "plain"), out / "packed"),
    "fp8 rows": lambda out: packed.fp8_rows(packed.save_model("llama", out / "plain"), out / "packed"),
    "nvfp4": lambda out: packed.nvfp4(packed.save_model("llama", out / "plain"), out / "packed"),
    "gptq": lambda out: packed.gptq(
        packed.save_model("mixtral", out / "plain"), out / "packed", desc_act=True
    ),
    "awq": lambda out: packed.awq(packed.save_model("llama", out / "plain"), out / "packed"),
    "mxfp4": lambda out: packed.mxfp4(out / "packed"),
    "nf4": lambda out: packed.nf4(packed.save_model("qwen3-moe", out / "plain"), out / "packed"),
    # Experts one by one, of models that transformers loads from one tensor of all experts only.
    "gpt-oss W4A16": lambda out: served("gpt-oss", out, W4),
    "llama4 FP8": lambda out: served("llama4", out, "float8-dynamic-act-float8-weight"),
    "torchao": lambda out: (
        loadstone.finalize(
            packed.save_model("llama", out / "plain"), out / "packed", recipe=f"{W4}:mapping=asymmetric"
        ).out
    ),
    "torchao experts": lambda out: (
        loadstone.finalize(
            packed.save_model("mixtral", out / "plain"), out / "packed", recipe="float8-weight-only"
        ).out
    ),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SOURCES[request.param](tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source finalized without a recipe."""
    return loadstone.finalize(source, tmp_path_factory.mktemp("out") / "plain", verify=True).out


def test_without_a_recipe_a_plain_checkpoint_is_written(source: Path, plain: Path) -> None:
    assert loadstone.detect(plain).kind == "dense"
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    expected, found = loadstone.load(source, device="cpu").state_dict(), stock(plain).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        values = expected[name].dequantize() if hasattr(expected[name], "dequantize") else expected[name]
        assert torch.equal(tensor, values), name


@pytest.mark.parametrize(
    "recipe, layout",
    [
        (W4, "torchao"),
        (W8, "torchao"),
        (W4, "compressed-tensors"),
        ("nvfp4-weight-only", "compressed-tensors"),
    ],
)
def test_recipes_give_what_the_decoded_weights_give(
    source: Path, plain: Path, tmp_path: Path, recipe: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loadstone.finalize(plain, tmp_path / "expected", recipe=recipe, layout=layout).out
    found = loadstone.finalize(source, tmp_path / "found", recipe=recipe, layout=layout, verify=True).out
    assert weights(found) == weights(expected)
    monkeypatch.setattr(units, "BLOCK", 5000)
    blocks = loadstone.finalize(source, tmp_path / "blocks", recipe=recipe, layout=layout).out
    assert weights(blocks) == weights(expected)
    assert torch.equal(
        loadstone.load(found, device="cpu").lm_head.weight, loadstone.load(plain, device="cpu").lm_head.weight
    )


def test_an_export_is_that_of_the_decoded_weights(source: Path, plain: Path, tmp_path: Path) -> None:
    export_fakequant(plain, tmp_path / "expected", format="int8")
    export_fakequant(source, tmp_path / "found", format="int8")
    export_fakequant(loadstone.load(plain, device="cpu"), tmp_path / "live", format="int8")
    expected = loadstone.load(tmp_path / "expected", device="cpu").state_dict()
    for name in ("found", "live"):
        found = loadstone.load(tmp_path / name, device="cpu").state_dict()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    manifest = json.loads((tmp_path / "found" / "loadstone.json").read_text())
    assert manifest["source"]["decoded"] == list(loadstone.plan_finalize(source).source.decoded)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SOURCES["fp8 block"](tmp_path_factory.mktemp("fp8"))


def test_two_ranks_and_a_resumed_run_give_the_same_bytes(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": W4, "layout": "compressed-tensors", "max_shard_size": "200KB"}
    whole = loadstone.finalize(fp8, tmp_path / "whole", **options).out
    plan = loadstone.plan_finalize(fp8, **options)
    assert len(plan.shards) > 3
    on_ranks(2, lambda: loadstone.finalize(fp8, tmp_path / "ranks", **options))
    assert weights(tmp_path / "ranks") == weights(whole)
    calls = 0

    def fail(count: int) -> None:
        nonlocal calls
        calls += count
        if calls > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(plan, tmp_path / "resumed", on_progress=fail)
    assert not (tmp_path / "resumed").exists()
    write_plan(plan, tmp_path / "resumed")
    assert weights(tmp_path / "resumed") == weights(whole)
    assert plan.bytes_after == sum(info.nbytes for info in loadstone.detect(whole).tensors.values())


def test_memory_is_that_of_blocks(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is decoded at once than blocks of the format that make up a unit of work."""
    from loadstone.loading import packed as reading
    from loadstone.quantization.decoding import decode_block

    sizes: list[int] = []

    def watched(*args: object) -> torch.Tensor:
        found = decode_block(*args)  # type: ignore[arg-type]
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(reading, "decode_block", watched)
    monkeypatch.setattr(units, "BLOCK", 1000)
    loadstone.finalize(fp8, tmp_path / "out", recipe=W4)
    assert max(sizes) == 128 * 256
    weights_of = loadstone.detect(fp8).packed.values()
    assert sum(sizes) == sum(weight.numel for weight in weights_of)


def test_eval_is_that_of_stocks_dequantized_model(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.small_models import make_tokenizer

    theirs = stock(fp8)
    fresh = type(theirs)(theirs.config).to(torch.bfloat16)
    fresh.load_state_dict(theirs.state_dict())
    fresh.save_pretrained(tmp_path / "stock")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a stone that knew the way. " * 20)
    ours = Path(shutil.copytree(fp8, tmp_path / "ours"))
    for directory in (ours, tmp_path / "stock"):
        make_tokenizer(vocabulary=300).save_pretrained(directory)
    same_losses(ours, tmp_path / "stock", text, capsys)


@pytest.mark.parametrize("name", ["mxfp4", "gpt-oss W4A16", "llama4 FP8"])
def test_eval_of_experts_is_that_of_the_plain_checkpoint(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.small_models import make_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a stone that knew the way. " * 20)
    source = SOURCES[name](tmp_path)
    plain = loadstone.finalize(source, tmp_path / "decoded").out
    for directory in (source, plain):
        make_tokenizer(vocabulary=300 if name == "mxfp4" else 240).save_pretrained(directory)
    same_losses(source, plain, text, capsys)


def same_losses(packed: Path, plain: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails unless `eval` finds one loss for a packed checkpoint, whole and streamed, and for a plain one."""
    losses = []
    for directory, stream in ((packed, ()), (packed, ("--stream",)), (plain, ())):
        report = text.with_name("found.json")
        code, _, err = run(
            capsys, "eval", "-M", directory, "--data", text, "--dtype", "bfloat16", "--separator", 1, "--json", report,
            *stream,
        )  # fmt: skip
        assert code == 0, err
        losses.append(json.loads(report.read_text())["models"][0]["loss"])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("where", ["manifest", "cache"])
def test_swapped_blocks_are_noticed_where_a_digest_is_recorded(fp8: Path, tmp_path: Path, where: str) -> None:
    """Values that are all sound in the wrong place: nothing but a digest tells."""
    from loadstone.artifact.hashing import sha256_file

    source = Path(shutil.copytree(fp8, tmp_path / "source"))
    file = source / "model.safetensors"
    digest = sha256_file(file)

    def swap(tensors: packed.Tensors) -> None:
        scale = tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"]
        scale.copy_(scale.flip(0, 1))

    packed.change(source, swap)
    if where == "manifest":
        (source / "loadstone.json").write_text(
            json.dumps({"format_version": 1, "files": {file.name: digest}})
        )
    else:
        (tmp_path / "blobs").mkdir()
        file.rename(tmp_path / "blobs" / digest)
        file.symlink_to(Path("..") / "blobs" / digest)
    with loadstone.following_links(), pytest.raises(ArtifactError, match="differs from the sha256"):
        loadstone.finalize(source, tmp_path / "out", recipe=W4, layout="compressed-tensors")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_layer_for_multi_token_prediction_is_decoded_and_kept(tmp_path: Path) -> None:
    """DeepSeek-V3's, which transformers does not load: servers look for it."""
    source = packed.fp8(packed.save_model("deepseek-v3", tmp_path / "plain"), tmp_path / "packed")

    def add(tensors: packed.Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors[name.replace("layers.1.", "layers.61.")] = tensors[name].clone()

    packed.change(source, add)
    loadstone.finalize(source, tmp_path / "out", verify=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in found if name.startswith("model.layers.61.")]
    assert len(names) > 20 and not any(name.endswith("scale_inv") for name in names)
    assert all(torch.equal(found[name], found[name.replace("layers.61.", "layers.1.")]) for name in names)
    served = {"recipe": W4, "layout": "compressed-tensors", "max_shard_size": "200KB"}
    loadstone.finalize(source, tmp_path / "w4", **served, verify=True)
    on_ranks(2, lambda: loadstone.finalize(source, tmp_path / "ranks", **served))
    assert weights(tmp_path / "ranks") == weights(tmp_path / "w4")
    ours = loadstone.load(tmp_path / "w4", device="cpu")
    assert ours.config.num_hidden_layers == 2
