"""Rounding of weights and inputs: ModelOpt's numbers, bit for bit, on the CPU and on a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.formats import FORMATS, parse_format
from loadstone.fakequant.formats.fold import fold, fold_input
from loadstone.fakequant.formats.spec import Integer, Staged, misfit
from loadstone.quantization import RECIPES

DTYPES = ["float32", "bfloat16", "float16"]
FOLDER = Path(__file__).parent / "golden"
GOLDEN = {d: load_file(FOLDER / f"modelopt-0.47-{d}.safetensors") for d in DTYPES}
# What ModelOpt's CUDA kernels made of the same weights, recorded on an H200 (record_golden_cuda.py).
KERNELS = {d: load_file(FOLDER / f"modelopt-0.47-cuda-{d}.safetensors") for d in DTYPES}
TEXTS = [*FORMATS, "fp8:granularity=row", "fp8:granularity=block"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_weights_equal_modelopt(text: str, dtype: str, device: str = "cpu") -> None:
    golden = GOLDEN[dtype]
    seen = 0
    for width in (128, 80):
        if f"{text}.{width}" in golden:
            ours = fold("w", golden[f"weight.{width}"].to(device), parse_format(text).weight).cpu()
            assert ours.dtype == golden[f"weight.{width}"].dtype
            assert torch.equal(ours, golden[f"{text}.{width}"]), (text, width)
            seen += 1
    assert seen == (1 if text == "mxfp4" else 2)


@pytest.fixture
def float64_default() -> Iterator[None]:
    """What users of Bayesian optimisation set."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("text", TEXTS)
def test_the_processs_default_dtype_changes_nothing(text: str, request: pytest.FixtureRequest) -> None:
    generator, spec = torch.Generator().manual_seed(0), parse_format(text).weight
    weights = [0.02 * torch.randn(64, 512, generator=generator).bfloat16() for _ in range(20)]
    expected = [fold("w", weight, spec) for weight in weights]
    request.getfixturevalue("float64_default")
    assert all(torch.equal(fold("w", w, spec), e) for w, e in zip(weights, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int8", "fp8", "fp8-token"])
def test_inputs_equal_modelopt(spec: str, dtype: str, device: str = "cpu") -> None:
    golden = GOLDEN[dtype]
    for width in (128, 80):
        amax = golden.get(f"amax:{spec}.{width}")
        x = golden[f"input.{width}"].to(device)
        ours = fold_input(x, spec, None if amax is None else amax.float().to(device)).cpu()  # type: ignore[arg-type]
        assert torch.equal(ours, golden[f"input:{spec}.{width}"])


def beside_kernels(text: str, dtype: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight, ours, the CUDA kernel's) for each width that was recorded."""
    weights, found = GOLDEN[dtype] | KERNELS[dtype], []
    for width in (128, 80, 512):
        if f"{text}.{width}" in KERNELS[dtype]:
            weight = weights[f"weight.{width}"]
            ours = fold("w", weight, parse_format(text).weight)
            found.append((weight, ours, KERNELS[dtype][f"{text}.{width}"]))
    assert len(found) == (2 if "mxfp" in text else 3)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["int8", "mxfp8"])
def test_weights_equal_modelopts_kernels(text: str, dtype: str) -> None:
    assert all(torch.equal(ours, theirs) for _, ours, theirs in beside_kernels(text, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["fp8", "fp8:granularity=row"])
def test_fp8_kernels_differ_in_the_last_bits(text: str, dtype: str) -> None:
    for weight, ours, theirs in beside_kernels(text, dtype):
        far = (ours - theirs).abs() > 2 * torch.finfo(weight.dtype).eps * theirs.abs()
        # A scale a bit apart turns a handful of near ties.
        assert int(far.sum()) <= 12
        # Their scale is 448 over the range, where the CPU path multiplies 448 by the reciprocal.
        x = weight.float()
        amax = x.abs().amax(1, keepdim=True) if "row" in text else x.abs().max()
        scale = torch.tensor(448.0) / torch.where(amax <= 2**-24, 1.0, amax)
        whole = (x * scale).to(torch.float8_e4m3fn).float() * (torch.tensor(1.0) / scale)
        assert torch.equal(whole.to(weight.dtype), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mxfp4_kernel_differs_at_ties(dtype: str) -> None:
    seen = 0
    for weight, ours, theirs in beside_kernels("mxfp4", dtype):
        differ = ours != theirs
        seen += int(differ.sum())
        # The mean of both is the tie that one rounds towards zero and the other to the even code.
        assert torch.equal(weight.float()[differ], ((ours.float() + theirs.float()) / 2)[differ])
        assert bool((ours.abs() < theirs.abs())[differ].all())
    assert seen > 40


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nvfp4_kernel_zeroes_blocks_whose_scale_is_tiny(dtype: str) -> None:
    zeroed = 0
    for weight, ours, theirs in beside_kernels("nvfp4", dtype):
        blocks = weight.float().reshape(len(weight), -1, 16)
        step = blocks.abs().max() / (6 * 448)
        scale = blocks.abs().amax(-1) / (6 * step)
        differ = (ours != theirs).reshape(blocks.shape)
        # e4m3 rounds the scale to 0, where ours is clamped to its smallest number; or it is under 1e-5.
        tiny = (scale <= 2**-10) | (scale.to(torch.float8_e4m3fn).float() * step < 1e-5)
        assert bool((theirs.reshape(blocks.shape)[differ & tiny[..., None]] == 0).all())
        zeroed += int(differ[tiny].sum())
        # Elsewhere only Triton's division, which is not exact: a handful of near ties.
        assert int(differ[~tiny].sum()) <= 4
    assert zeroed > 300


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_weights_equal_modelopt_on_gpu(text: str, dtype: str) -> None:
    test_weights_equal_modelopt(text, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int8", "fp8", "fp8-token"])
def test_inputs_equal_modelopt_on_gpu(spec: str, dtype: str) -> None:
    test_inputs_equal_modelopt(spec, dtype, "cuda")


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8", "mxfp4"])
def test_block_inputs_round_as_their_weights_do(spec: str) -> None:
    x = GOLDEN["bfloat16"]["weight.128"]
    amax = x.abs().max().float()
    assert torch.equal(fold_input(x, spec, amax), fold("x", x, FORMATS[spec].weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_change_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    spec = parse_format(text).weight
    whole = fold("w", weight, spec)
    monkeypatch.setattr("loadstone.fakequant.formats.fold._CHUNK", 7 * 256)
    assert torch.equal(fold("w", weight, spec), whole)
    assert not torch.equal(whole, weight)


@pytest.mark.parametrize("text", ["int4", "mxfp8", "mxfp4"])
def test_folding_twice_changes_nothing(text: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    once = fold("w", weight, parse_format(text).weight)
    assert torch.equal(fold("w", once, parse_format(text).weight), once)


def test_staged_formats_apply_in_order() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    spec = FORMATS["w4a8"].weight
    assert isinstance(spec, Staged)
    ours = fold("w", weight, spec)
    reverse = fold("w", weight, Staged(spec.stages[::-1]))
    assert not torch.equal(ours, reverse)
    assert not torch.equal(ours, fold("w", weight, Integer(4, 128)))
    assert all(len(block.unique()) <= 16 for block in ours.reshape(-1, 128))


@pytest.mark.parametrize("recipe", [n for n, r in RECIPES.items() if "cpu" in r.devices])
def test_torchao_recipes_fold_by_dequantize(recipe: str) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import to_torchao

    linear = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    weight = linear.weight.detach().clone()
    quantize_(linear, to_torchao(RECIPES[recipe].scheme))
    assert torch.equal(
        fold("w", weight, parse_format(recipe).weight), linear.weight.dequantize().to(torch.bfloat16)
    )


def test_experts_are_folded_one_by_one() -> None:
    weight = torch.randn(3, 32, 64)
    weight[1] *= 100
    for text in ("fp8", "nvfp4", "int8-weight-only"):
        spec = parse_format(text).weight
        assert torch.equal(fold("w", weight, spec), torch.stack([fold("w", e, spec) for e in weight]))


@pytest.mark.parametrize("text", TEXTS)
def test_zeros_and_empty_weights(text: str) -> None:
    spec = parse_format(text).weight
    assert torch.equal(fold("w", torch.zeros(4, 128), spec), torch.zeros(4, 128))
    assert fold("w", torch.zeros(0, 128), spec).shape == (0, 128)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_tensor(bad: float) -> None:
    weight = torch.zeros(4, 128)
    weight[2, 3] = bad
    with pytest.raises(ArtifactError, match=r"model\.x\.weight' holds NaN or infinity"):
        fold("model.x.weight", weight, FORMATS["int8"].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_amax_names_the_tensor(bad: float) -> None:
    with pytest.raises(ArtifactError, match=r"model\.x\.weight': its amax is NaN, infinite or negative"):
        fold("model.x.weight", torch.ones(4, 128), FORMATS["fp8"].weight, amax=torch.tensor(bad))


@pytest.mark.parametrize(("text", "width"), [("nvfp4", 24), ("mxfp4", 48), ("intx4-weight-only", 48)])
def test_widths_that_a_format_forbids(text: str, width: int) -> None:
    spec = parse_format(text).weight
    assert misfit(spec, (32, width))
    with pytest.raises(ArtifactError, match=f"'w' cannot be folded: .*{width}"):
        fold("w", torch.ones(32, width), spec)


def test_formats_by_name() -> None:
    assert str(parse_format("int4:block=32")) == "int4:block=32"
    assert parse_format("fp8:granularity=row").inputs == "fp8-token"
    assert parse_format("fp8:granularity=block").inputs is None
    assert parse_format("intx4-weight-only:group_size=64").text == "intx4-weight-only:group_size=64"
    for text, hint in (
        ("nvfp", "Did you mean 'nvfp4'"),
        ("int8:block=32", "has no option 'block'"),
        ("int4:block=x", "not a block size"),
        ("fp8:granularity=col", "One of tensor, row, block"),
    ):
        with pytest.raises(UsageError, match=hint):
            parse_format(text)
