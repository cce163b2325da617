"""The native loader against stock `from_pretrained`: same bits where stock is right, an error where it is silent."""

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers import TOKENS, logits, stock

import loadstone
from loadstone.errors import ArtifactError, MissingError
from loadstone.quantization import RECIPES

ON_CPU = [name for name, recipe in RECIPES.items() if "cpu" in recipe.devices]
ARCHITECTURES = ["llama-tied", "llama-untied", "qwen2", "qwen3", "gemma2", "gpt2", "qwen3-moe"]
W4 = "int8-dynamic-act-int4-weight"


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (path / "config.json").write_text(json.dumps(config))


def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dense_equals_stock(make_model: Callable[..., Path], arch: str, shards: str) -> None:
    path = make_model(arch, max_shard_size=shards)
    model = loadstone.load(path)
    assert torch.equal(logits(model), logits(stock(path)))
    assert not model.training


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "gpt2"])
@pytest.mark.parametrize("recipe", [W4, "int8-weight-only", "nvfp4-weight-only"])
def test_quantized_equals_stock(make_model: Callable, quantize_to: Callable, arch: str, recipe: str) -> None:
    path = quantize_to(make_model(arch), recipe)
    model, reference = loadstone.load(path), stock(path)
    # torchao takes no views of merged experts in inference mode (docs/recipes.md).
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert type(ours) is type(theirs), name
        assert ours.requires_grad == theirs.requires_grad, name


@pytest.mark.parametrize("recipe", ON_CPU)
def test_every_recipe_equals_stock(tiny: Path, quantize_to: Callable[..., Path], recipe: str) -> None:
    path = quantize_to(tiny, recipe)
    assert torch.equal(logits(loadstone.load(path)), logits(stock(path)))


@pytest.mark.parametrize("recipe", ON_CPU)
def test_float32_on_a_quantized_artifact_is_right(
    tiny: Path, quantize_to: Callable[..., Path], recipe: str
) -> None:
    # Stock transformers ends in a matmul dtype error here.
    path = quantize_to(tiny, recipe)
    exact = logits(loadstone.load(path, dtype="float32"))
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, logits(loadstone.load(path)).float(), rtol=0.1, atol=0.05)


def test_tied_weights_stay_one_tensor(tiny: Path, quantize_to: Callable[..., Path]) -> None:
    for path in (tiny, quantize_to(tiny, W4)):
        model = loadstone.load(path)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loaded_model_can_be_saved_by_transformers(tiny: Path, quantize_to: Callable, tmp_path: Path) -> None:
    model = loadstone.load(quantize_to(tiny, W4))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(loadstone.load(tmp_path / "again")))


def test_unmarked_is_recovered_from_its_tensors(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    whole = quantize_to(tiny, W4)
    path = copy(whole, tmp_path)
    edit_config(path, quantization_config=None)
    assert loadstone.detect(path).kind == "torchao-unmarked"
    model = loadstone.load(path)
    assert torch.equal(logits(model), logits(loadstone.load(whole)))
    block = model.config.quantization_config.to_dict()
    assert (
        block["quant_type"]
        == json.loads((whole / "config.json").read_text())["quantization_config"]["quant_type"]
    )


def test_bin_with_torchao_tensors(tiny: Path, tmp_path: Path) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import to_torchao

    model = loadstone.load(tiny)
    quantize_(model.model, to_torchao(RECIPES[W4].scheme))
    path = tmp_path / "bin"
    shutil.copytree(tiny, path, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    torch.save(state, path / "pytorch_model.bin")
    assert loadstone.detect(path).kind == "torchao-unmarked"
    assert torch.equal(logits(loadstone.load(path)), logits(model))
    assert loadstone.load(path, dtype="float32").dtype == torch.float32


def bin_directory(source: Path, path: Path, state: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("saved_as", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_a_value_of_a_bin_that_is_not_finite_is_named(tiny: Path, tmp_path: Path, saved_as: Callable) -> None:
    state = {k: v for k, v in stock(tiny).state_dict().items() if k != "lm_head.weight"}
    state["model.norm.weight"][3] = float("nan")
    path = bin_directory(tiny, tmp_path / "bin", {k: saved_as(v) for k, v in state.items()})
    with pytest.raises(ArtifactError, match=r"pytorch_model.bin: tensor 'model.norm.weight' holds NaN"):
        loadstone.load(path)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("scale", float("nan"), "_weight_scale' holds NaN"),
        ("scale", 0.0, "_weight_scale' holds a scale that is not above zero"),
        ("qdata", 99, "_weight_qdata' holds values outside -8 to 7"),
    ],
)
def test_a_torchao_tensor_of_a_bin_is_held_to_its_limits(
    tiny: Path, tmp_path: Path, part: str, value: float, says: str
) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import to_torchao

    model = loadstone.load(tiny)
    quantize_(model.model, to_torchao(RECIPES[W4].scheme))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    getattr(state["model.layers.1.mlp.up_proj.weight"], part)[0, 0] = value
    with pytest.raises(ArtifactError, match=rf"pytorch_model.bin: tensor 'model.layers.1.mlp.up_proj.{says}"):
        loadstone.load(bin_directory(tiny, tmp_path / "bin", state))


def test_the_scheme_of_a_bin_is_that_of_most_of_its_tensors(tiny: Path, tmp_path: Path) -> None:
    from torchao.quantization import quantize_

    from loadstone.loading.quantizer import recovered_scheme
    from loadstone.quantization import parse_recipe, to_torchao

    model, usual = loadstone.load(tiny), parse_recipe(f"{W4}:mapping=asymmetric").scheme
    first = model.model.layers[0].self_attn.q_proj
    quantize_(first, to_torchao(RECIPES["int8-weight-only"].scheme))
    quantize_(
        model.model,
        to_torchao(usual),
        filter_fn=lambda m, _: isinstance(m, torch.nn.Linear) and m is not first,
    )
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    path = bin_directory(tiny, tmp_path / "bin", state)
    assert recovered_scheme(loadstone.detect(path)) == usual
    assert torch.equal(logits(loadstone.load(path)), logits(model))


def test_plain_bin(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "bin"
    shutil.copytree(tiny, path, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(stock(tiny).state_dict(), path / "pytorch_model.bin")
    assert torch.equal(logits(loadstone.load(path)), logits(stock(tiny)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight' is missing"),
        (lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}), "layers.9.extra' is not part of"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"model.norm.weight' has shape \[32\]"),
        (lambda t: t["model.norm.weight"].__setitem__(3, float("nan")), "model.norm.weight' holds NaN"),
        (
            lambda t: t["model.embed_tokens.weight"].__setitem__((9, 9), float("inf")),
            "embed_tokens.weight' holds NaN",
        ),
    ],
    ids=["missing", "unexpected", "shape", "nan", "inf"],
)
def test_what_stock_passes_over_is_an_error(tiny: Path, tmp_path: Path, change: Callable, says: str) -> None:
    path = copy(tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=says):
        loadstone.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", "many"), ("vocab_size", -1), ("vocab_size", 0), ("use_cache", []), ("hidden_act", 3)],
)
def test_a_config_that_makes_no_model_is_an_error_at_every_door(
    tiny: Path, tmp_path: Path, key: str, value: object
) -> None:
    from loadstone.loading.meta import meta_model
    from loadstone.loading.streamed import streamed

    path = copy(tiny, tmp_path)
    edit_config(path, **{key: value})
    with pytest.raises(ArtifactError, match=r"config\.json: "):
        loadstone.load(path)
    with (
        pytest.raises(ArtifactError, match=r"config\.json: "),
        streamed(loadstone.plan(path), torch.device("cpu")),
    ):
        pass
    with contextlib.suppress(ArtifactError):  # a meta tensor may have rows that a real one cannot
        meta_model(loadstone.detect(path))


@pytest.mark.parametrize("recipe", ["", "int8-weight-only"])
def test_integers_beside_layers_kept_in_float32_have_the_dtype_of_stock(tmp_path: Path, recipe: str) -> None:
    """transformers casts the count of a batch norm in float32, but none in a quantized checkpoint."""
    import transformers
    from tests.zoo.models import save

    save("granite_speech5_encoder", tmp_path)
    loadstone.finalize(tmp_path / "model", tmp_path / "q", recipe=recipe or None)
    stock = transformers.AutoModel.from_pretrained(tmp_path / "q").state_dict()
    ours = loadstone.load(tmp_path / "q").state_dict()
    count = "layers.0.conv.norm.num_batches_tracked"
    assert stock[count].is_floating_point() == (not recipe)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in stock.items()}


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl"])
def test_what_transformers_quantized_and_saved_itself(tmp_path: Path, model_type: str) -> None:
    """Parts have the checkpoint's names there, their descriptions those of the model."""
    import transformers
    from tests.zoo.models import save
    from torchao.quantization import Int8WeightOnlyConfig

    kind = getattr(transformers, save(model_type, tmp_path)["class"].partition(":")[2])
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    kind.from_pretrained(tmp_path / "model", quantization_config=config).save_pretrained(tmp_path / "q")
    stock, ours = (
        kind.from_pretrained(tmp_path / "q").state_dict(),
        loadstone.load(tmp_path / "q").state_dict(),
    )
    assert list(stock) == list(ours)
    assert any(type(tensor).__name__ == "Int8Tensor" for tensor in ours.values())
    for name, tensor in stock.items():
        assert type(ours[name]) is type(tensor)
        quantized = type(tensor).__name__ == "Int8Tensor"
        one, other = (t.dequantize() if quantized else t for t in (tensor, ours[name]))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_generation_config_is_named(tiny: Path, tmp_path: Path, text: str) -> None:
    path = copy(tiny, tmp_path)
    (path / "generation_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"generation_config\.json: transformers refuses it"):
        loadstone.load(path)


def test_a_gpu_that_is_full_says_what_to_do(tiny: Path) -> None:
    from loadstone.loading.model_class import construction

    with (
        pytest.raises(MissingError, match=r"does not fit the GPU \(CUDA out of memory.*--device auto"),
        construction(loadstone.detect(tiny), torch.nn.Linear),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_non_finite_scale_is_named(tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    path = copy(quantize_to(tiny, W4), tmp_path)
    info = loadstone.detect(path).tensors["model.layers.1.mlp.up_proj._weight_scale"]
    raw = bytearray((path / info.file).read_bytes())
    raw[info.begin + 6 : info.begin + 8] = b"\xc0\x7f"
    (path / info.file).write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"up_proj._weight_scale' holds NaN"):
        loadstone.load(path)


def test_threads_load_at_once(make_model: Callable[..., Path]) -> None:
    """transformers changes the process while it builds a model: two at a time lose ties, dtypes and verbosity."""
    from transformers.utils import logging as hf

    paths = [make_model("llama-tied"), make_model("llama-tied", dtype="float32")] * 2
    expected = [logits(loadstone.load(path)) for path in paths[:2]] * 2
    before = hf.get_verbosity(), hf.is_progress_bar_enabled()
    with ThreadPoolExecutor(len(paths)) as pool:
        for _ in range(3):
            found = list(pool.map(lambda path: logits(loadstone.load(path)), paths))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (hf.get_verbosity(), hf.is_progress_bar_enabled()) == before


def test_library_leaves_verbosity_as_it_was(tiny: Path) -> None:
    from transformers.utils import logging as hf

    before = hf.get_verbosity(), hf.is_progress_bar_enabled()
    loadstone.load(tiny)
    assert (hf.get_verbosity(), hf.is_progress_bar_enabled()) == before


def _digest(path: Path, queue: Any) -> None:
    queue.put(logits(loadstone.load(path)).float().numpy().tobytes())


def test_two_processes_load_one_directory_at_once(tiny: Path, quantize_to: Callable[..., Path]) -> None:
    import multiprocessing

    path = quantize_to(tiny, W4)
    before = sorted(p.name for p in path.iterdir())
    expected = logits(loadstone.load(path)).float().numpy().tobytes()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    children = [fork.Process(target=_digest, args=(path, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [expected, expected]
    for child in children:
        child.join()
    assert sorted(p.name for p in path.iterdir()) == before


def test_an_interrupted_load_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.loading import native

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    before = sorted(p.name for p in tiny.iterdir())
    monkeypatch.setattr(native, "check_complete", stop)
    with pytest.raises(KeyboardInterrupt):
        loadstone.load(tiny)
    monkeypatch.undo()
    assert sorted(p.name for p in tiny.iterdir()) == before
    assert logits(loadstone.load(tiny)).isfinite().all()
