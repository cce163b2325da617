"""On a CUDA card: every recipe that runs there, both ways between CPU and GPU, bit for bit against stock."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import LoadstoneError, MissingError
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.quantization import RECIPES, parse_recipe, to_torchao
from loadstone.quantization.quantize import check_runs

pytestmark = pytest.mark.gpu
TOKENS = torch.arange(3, 35)[None]
ON_CPU = [name for name, recipe in RECIPES.items() if "cpu" in recipe.devices]


def logits(model: torch.nn.Module) -> torch.Tensor:
    # Not inference mode: torchao's fused experts cannot be viewed in it.
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.cpu()


def stock(path: Path, device: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(path, device_map={"": device}))


def runnable(name: str) -> None:
    try:
        check_runs(RECIPES[name], "cuda:0", "bfloat16")
    except LoadstoneError as error:
        pytest.skip(str(error))


def spelled(name: str) -> str:
    """The recipe with a group that fits the tiny models."""
    return f"{name}:group_size=32" if name == "int4-weight-only" else name


def finalize_on(device: str, source: Path, recipe: str, out: Path) -> Path:
    write_plan(
        make_plan(loadstone.detect(source), parse_recipe(spelled(recipe)), device=device), out, device=device
    )
    return out


@pytest.mark.parametrize("arch", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_finalized_and_loaded_on_cuda(
    make_model: Callable[..., Path], tmp_path: Path, recipe: str, arch: str
) -> None:
    from torchao.quantization import FqnToConfig, quantize_

    runnable(recipe)
    source = make_model(arch)
    path = finalize_on("cuda:0", source, recipe, tmp_path / "out")
    model = loadstone.load(path, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    ours = logits(model)
    assert ours.isfinite().all()
    assert torch.equal(ours, stock(path, "cuda:0"))
    whole = loadstone.load(source, device="cuda")
    # Experts in int8 have no grouped product: their config.json says "eager".
    whole.config._experts_implementation = model.config._experts_implementation
    config = to_torchao(parse_recipe(spelled(recipe)).scheme)
    quantize_(whole.model, config)
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and hasattr(p, "qdata")]
    of_experts = recipe.startswith("float8") or recipe.endswith(("int8-weight", "int8-weight-only"))
    assert bool(fused) == (arch == "qwen3-moe" and of_experts)
    if fused:
        quantize_(whole, FqnToConfig(dict.fromkeys(fused, config)), filter_fn=None)
    assert torch.equal(ours, logits(whole))


@pytest.mark.parametrize("recipe", ON_CPU)
def test_from_cpu_to_cuda(tiny: Path, tmp_path: Path, recipe: str) -> None:
    runnable(recipe)
    path = finalize_on("cpu", tiny, recipe, tmp_path / "out")
    assert torch.equal(logits(loadstone.load(path, device="cuda:0")), stock(path, "cuda:0"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_cuda_to_cpu(tiny: Path, tmp_path: Path, recipe: str) -> None:
    runnable(recipe)
    path = finalize_on("cuda:0", tiny, recipe, tmp_path / "out")
    if recipe == "float8-dynamic-act-float8-weight":
        with pytest.raises(MissingError, match="needs a CUDA GPU"):
            loadstone.load(path, device="cpu")
        return
    model = loadstone.load(path, device="cpu")
    if recipe in ON_CPU:
        assert torch.equal(logits(model), stock(path, "cpu"))
        return
    # A packing for one device: the same values, so that the products differ by rounding alone.
    on_gpu = loadstone.load(path, device="cuda")
    for name, weight in on_gpu.named_parameters():
        if hasattr(weight, "scale_and_zero"):
            eye = torch.eye(weight.shape[1], dtype=torch.bfloat16)
            repacked = model.get_parameter(name)
            ours = torch.nn.functional.linear(eye, repacked)
            theirs = torch.nn.functional.linear(eye.cuda(), weight).cpu()
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(logits(model).float(), logits(on_gpu).float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "recipe", [None, "int8-dynamic-act-int4-weight", "int8-weight-only", "float8-weight-only"]
)
def test_layers_offloaded_to_the_cpu(tiny: Path, tmp_path: Path, recipe: str | None) -> None:
    from loadstone.loading.native import load_native

    path = finalize_on("cuda:0", tiny, recipe, tmp_path / "out") if recipe else tiny
    device_map = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0}
    device_map |= {"model.layers.0": 0, "model.layers.1": "cpu"}
    if recipe in ("int8-weight-only", "float8-weight-only"):
        with pytest.raises(MissingError, match="cannot move a"):
            load_native(loadstone.plan(path), device_map)
        return
    model = load_native(loadstone.plan(path), device_map)
    assert torch.equal(logits(model), logits(loadstone.load(path, device="cuda")))


@pytest.mark.parametrize("recipe", [None, "int8-dynamic-act-int4-weight"])
def test_the_same_bytes_from_cpu_and_cuda(tiny: Path, tmp_path: Path, recipe: str | None) -> None:
    from safetensors.torch import load_file

    for device in ("cpu", "cuda:0"):
        scheme = parse_recipe(recipe) if recipe else None
        write_plan(
            make_plan(loadstone.detect(tiny), scheme, device=device), tmp_path / device[:4], device=device
        )
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "cuda"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_dense_on_cuda(tiny: Path) -> None:
    assert torch.equal(logits(loadstone.load(tiny, device="cuda")), stock(tiny, "cuda:0"))
    assert loadstone.load(tiny, device="auto").device.type == "cuda"
