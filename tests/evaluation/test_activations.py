"""`eval --activations`: inputs are rounded as a server does, said in the record, and part of the cache's key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import logits, run, stock

import loadstone
from loadstone.errors import UsageError
from loadstone.evaluation.served_inputs import input_changes, round_model_inputs
from loadstone.loading import load_tokenizer
from loadstone.text.corpus import read_corpus

TEXT = ["once upon a time there was a stone that knew the way " * 30]
INT8, FP8 = "int8-dynamic-act-int8-weight", "float8-dynamic-act-float8-weight"
NVFP4, MXFP8 = "nvfp4-dynamic-act-nvfp4-weight", "mxfp8-dynamic-act-mxfp8-weight"


@pytest.fixture(scope="module")
def served(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(recipe: str, family: str = "llama-tied") -> Path:
        if (recipe, family) not in made:
            out = tmp_path_factory.mktemp("served") / recipe
            # The trained model where inputs of a real size matter: vLLM's scales of float8 have a floor.
            source = family if family.startswith("builtin") else make_model(family)
            calibration = {"calibrate": "sample" if source == family else TEXT, "calibrate_tokens": 512}
            loadstone.finalize(
                source,
                out,
                recipe=recipe,
                layout="compressed-tensors",
                **(calibration if recipe == NVFP4 else {}),
            )
            made[recipe, family] = out
        return made[recipe, family]

    return get


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[0])
    return file


def changed(path: Path, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without and with rounded inputs."""
    model = loadstone.load(path, **options)
    plain = logits(model)
    undo = round_model_inputs(model, input_changes(loadstone.detect(path), model))
    found = logits(model)
    undo()
    assert torch.equal(logits(model), plain)
    return plain, found


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("recipe", [INT8, FP8, NVFP4, MXFP8])
def test_every_quantized_layer_rounds_its_inputs(
    recipe: str, family: str, served: Callable[..., Path]
) -> None:
    path = served(recipe, family)
    artifact, model = loadstone.detect(path), loadstone.load(path)
    expected = {name for name, p in model.named_parameters() if "proj" in name}
    assert input_changes(artifact, model).keys() == expected
    plain, found = changed(path, dtype="float32")
    size = (found - plain).norm() / plain.norm()
    assert 0 < size < (0.5 if recipe == NVFP4 else 0.05)


def test_the_record_and_the_key_of_the_cache_say_so(
    served: Callable[..., Path], tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = served(INT8)
    options = {"data": text, "separator": "1", "cache": tmp_path / "cache", "baseline": tiny}
    plain = loadstone.evaluate(path, **options).records
    rounded = loadstone.evaluate(path, activations=True, **options).records
    assert [r["inputs"] for r in plain] == [None, None]
    assert [r["inputs"] for r in rounded] == [None, "int8 per token, scale = largest / 127 (as vLLM 0.32)"]
    assert rounded[0]["loss"] == plain[0]["loss"] and rounded[1]["loss"] != plain[1]["loss"]
    # The dense model rounds nothing, so its scores are the same.
    assert [r["cached"] for r in rounded] == [True, False]
    assert all(r["cached"] for r in loadstone.evaluate(path, activations=True, **options).records)
    code, out, _ = run(
        capsys,
        "eval",
        "-M",
        path,
        "--data",
        text,
        "--separator",
        1,
        "--activations",
        "--json",
        tmp_path / "r.json",
    )
    assert code == 0 and "inputs rounded to int8 per token" in out
    (record,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert record["loss"] == pytest.approx(rounded[1]["loss"], abs=1e-7)


@pytest.mark.parametrize("recipe", [INT8, NVFP4])
def test_streamed_layer_by_layer_it_is_the_same(recipe: str, served: Callable[..., Path], text: Path) -> None:
    options = {"data": text, "separator": "1", "activations": True}
    whole, streamed = (
        loadstone.evaluate(served(recipe), stream=stream, **options).records[0] for stream in (False, True)
    )
    assert whole["loss"] == streamed["loss"]


def test_models_without_quantized_inputs_are_refused(
    served: Callable[..., Path], tiny: Path, text: Path
) -> None:
    for path in (tiny, served("intx4-weight-only")):
        with pytest.raises(UsageError, match="has no quantized inputs"):
            loadstone.evaluate(path, data=text, separator="1", activations=True)


def test_merged_layers_take_the_largest_stored_scale(served: Callable[..., Path], tmp_path: Path) -> None:
    """As vLLM does where q, k and v came with scales of their own."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m"
    shutil.copytree(served(NVFP4), path)
    state = load_file(path / "model.safetensors")
    layer = "model.layers.0.self_attn"
    state[f"{layer}.k_proj.input_global_scale"] *= 3
    save_file(state, path / "model.safetensors", {"format": "pt"})
    model = loadstone.load(path)
    changes = input_changes(loadstone.detect(path), model)
    x = torch.randn(4, 64)
    found = [changes[f"{layer}.{name}.weight"](x) for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    before = input_changes(loadstone.detect(served(NVFP4)), model)[f"{layer}.q_proj.weight"](x)
    assert not torch.equal(found[0], before)


@pytest.mark.serving
@pytest.mark.parametrize("recipe", [FP8, INT8, NVFP4, MXFP8])
def test_the_loss_is_that_of_compressed_tensors_own_forward(recipe: str, served: Callable[..., Path]) -> None:
    """Of the frozen dynamic scheme, on the same weights. Rounding makes whole steps of the last
    bits in which they differ; int8 has another scale there (largest / 127.5 instead of 127), NVFP4 and MXFP8 run in
    bfloat16 only. `test_served_inputs` compares the rounding itself."""
    from compressed_tensors.quantization import QuantizationStatus

    path = served(recipe, "builtin:tiny-llama")
    dtype = torch.float32 if recipe in (FP8, INT8) else torch.bfloat16
    documents = read_corpus("sample").documents[:4]
    ids = torch.tensor(load_tokenizer(path)("".join(documents))["input_ids"][:512])[None]

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss.float())

    model = stock(path, dtype=dtype)
    theirs = loss(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.quantization_scheme.input_activations.dynamic
    assert layer.quantization_status >= QuantizationStatus.FROZEN
    ours = loadstone.load(path, dtype=str(dtype).removeprefix("torch."))
    weights = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        # In float32 they multiply scales in float32, and vLLM in the scale's own dtype.
        parameter.data.copy_(weights[name])
    plain = loss(ours)
    round_model_inputs(ours, input_changes(loadstone.detect(path), ours))
    found = loss(ours)
    assert found != plain
    assert found == pytest.approx(theirs, abs={FP8: 5e-3, INT8: 3e-3, NVFP4: 0.03, MXFP8: 0.01}[recipe])
