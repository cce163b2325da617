"""What makes an artifact fail elsewhere is said by `inspect`, which then exits with 3; where each scheme runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.artifact.compressed_tensors.test_block import SCHEMES
from tests.helpers import run

import loadstone
from loadstone.artifact.report import collect
from loadstone.artifact.servers import SERVERS, largest_tensor_parallel, where_it_runs

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in made:
            out = tmp_path_factory.mktemp("served") / "out"
            loadstone.finalize(tiny, out, recipe=recipe, layout="compressed-tensors")
            made[recipe] = out
        return made[recipe]

    return get


def set_block(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]
    for key, value in changes.items():
        if value is None:
            del block[key]
        else:
            block[key] = value
    (path / "config.json").write_text(json.dumps(config))


def set_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("recipe", ["intx4-weight-only", "nvfp4-weight-only", "int8-dynamic-act-int8-weight"])
def test_what_finalize_writes_has_no_problem(
    recipe: str, written: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = written(recipe)
    report = collect(out)
    assert report.problems == () and report.serving == ()
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0 and "Where it runs" in text and "vLLM" in text
    code, text, _ = run(capsys, "inspect", out, "--json")
    serving = json.loads(text)["serving"]
    assert serving["problems"] == [] and {r["server"] for r in serving["runs"]} == set(SERVERS)
    assert serving["largest_tensor_parallel"] >= 1


def _plain_head(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def _plain_q(state: dict[str, torch.Tensor]) -> None:
    packed = state.pop(f"{LAYER}.self_attn.q_proj.weight_packed")
    for part in ("weight_scale", "weight_shape"):
        del state[f"{LAYER}.self_attn.q_proj.{part}"]
    state[f"{LAYER}.self_attn.q_proj.weight"] = torch.zeros(packed.shape[0], packed.shape[1] * 8).bfloat16()


def _no_shape(state: dict[str, torch.Tensor]) -> None:
    del state[f"{LAYER}.mlp.up_proj.weight_shape"]


def _float32_scale(state: dict[str, torch.Tensor]) -> None:
    state[f"{LAYER}.mlp.up_proj.weight_scale"] = state[f"{LAYER}.mlp.up_proj.weight_scale"].float()


def _order(state: dict[str, torch.Tensor]) -> None:
    columns = int(state[f"{LAYER}.mlp.up_proj.weight_shape"][1])
    state[f"{LAYER}.mlp.up_proj.weight_g_idx"] = torch.arange(columns, dtype=torch.int32) // 32


def _own_scale(state: dict[str, torch.Tensor]) -> None:
    state[f"{LAYER}.mlp.up_proj.weight_global_scale"] *= 2


INT4, NVFP4 = "intx4-weight-only", "nvfp4-weight-only"


@pytest.mark.parametrize(
    ("recipe", "block", "tensors", "said"),
    [
        (INT4, {"quantization_status": None}, None, "quantization_status is missing"),
        (INT4, {"quantization_status": "compresed"}, None, "quantization_status is 'compresed'"),
        (INT4, {"ignore": []}, None, "'lm_head' is stored plain, and 'ignore' does not name it"),
        (INT4, {"ignore": ["lm_head", "re:.*up_proj"]}, None, "which is quantized"),
        (INT4, {"ignore": []}, _plain_head, "'lm_head' is stored plain"),
        (INT4, {"ignore": ["lm_head", f"{LAYER}.self_attn.q_proj"]}, _plain_q, "self_attn.q_proj: plain"),
        (INT4, {}, _no_shape, "lacks weight_shape"),
        (INT4, {}, _float32_scale, "has dtype F32, the model BF16"),
        (INT4, {}, _order, "actorder group"),
        (NVFP4, {}, _own_scale, "have different global scales"),
    ],
)
def test_each_problem_is_named(
    recipe: str, block: dict[str, object], tensors: Callable[[dict[str, torch.Tensor]], None] | None, said: str,
    written: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(written(recipe), out)
    set_block(out, **block)
    if tensors:
        set_tensors(out, tensors)
    code, text, err = run(capsys, "inspect", out)
    assert code == 3, text + err
    assert f"elsewhere: {text.split('elsewhere: ', 1)[1].splitlines()[0]}" in text
    messages = [problem.message for problem in collect(out).serving]
    assert any(said in message for message in messages), messages
    # The tensors say enough to load it here.
    if tensors is not _plain_head:
        assert loadstone.load(out).get_parameter(f"{LAYER}.mlp.up_proj.weight").isfinite().all()


def test_a_group_that_does_not_divide_the_width(tmp_path: Path) -> None:
    """As older releases wrote it: the last group of a row holds fewer values, which vLLM does not read."""
    from loadstone.artifact.compressed_tensors import Block, Group, packed_weights
    from loadstone.artifact.compressed_tensors.problems import serving_problems
    from loadstone.artifact.formats.safetensors import TensorInfo

    shapes = {
        "weight_packed": ("I32", (8, 72)),
        "weight_scale": ("BF16", (8, 5)),
        "weight_shape": ("I64", (2,)),
    }
    infos = {f"a.{n}": TensorInfo(f"a.{n}", d, s, "f", 0, 0) for n, (d, s) in shapes.items()}
    block = Block((Group("g", ("Linear",), SCHEMES["W4A16 g128"]),), status="compressed")
    packed = packed_weights(block, infos, read_shape=lambda info: (8, 576))
    assert packed["a.weight"].shape == (8, 576)
    (problem,) = serving_problems(tmp_path, {}, block, packed, infos)
    assert "576 columns, no multiple of the group size 128" in problem.message


def test_where_schemes_run() -> None:
    """The rows of docs/serving.md that differ most."""
    runs = {(r.scheme, r.server): r for r in where_it_runs(SCHEMES.values(), experts=False)}
    assert len(runs) == 4 * len(SCHEMES)
    assert "Machete" in runs["W4A16 g128", "vLLM"].how and runs["W4A16 g128", "SGLang"].runs
    assert not runs["W4A16 g64 asymmetric", "transformers"].runs
    assert not runs["W8A8 channel", "TensorRT-LLM"].runs and "FP8" in runs["W8A8 channel", "TensorRT-LLM"].how
    assert runs["FP8 dynamic channel", "TensorRT-LLM"].runs and runs["FP8 block", "TensorRT-LLM"].runs
    assert not runs["MXFP8", "SGLang"].runs
    experts = {(r.scheme, r.server): r.runs for r in where_it_runs(SCHEMES.values(), experts=True)}
    assert not experts["NVFP4A16", "transformers"] and runs["NVFP4A16", "transformers"].runs
    assert not experts["W8A8 channel", "SGLang"] and runs["W8A8 channel", "SGLang"].runs


def test_how_many_gpus_share_it(tiny: Path, written: Callable[[str], Path]) -> None:
    artifact = loadstone.detect(written(INT4))
    width = artifact.config["intermediate_size"]
    assert largest_tensor_parallel(artifact) in (1, 2, 4, 8)
    assert width // 32 % largest_tensor_parallel(artifact) == 0
    assert largest_tensor_parallel(loadstone.detect(tiny)) is None


def test_torchaos_layout_says_what_vllm_refuses(tiny: Path, tmp_path: Path) -> None:
    for name, options, runs in (
        ("a", {"recipe": "int8-weight-only"}, True),
        ("b", {"recipe": "int8-weight-only", "skip": ["q_proj"]}, False),
        ("c", {"recipe": "nvfp4-weight-only"}, False),
    ):
        plan = loadstone.plan_finalize(tiny, **options)
        loadstone.finalize(tiny, tmp_path / name, **options)
        from loadstone.artifact.servers import runs_of

        found = {run.server: run for run in runs_of(loadstone.detect(tmp_path / name))}
        assert tuple(found.values()) == plan.runs
        assert found["vLLM"].runs == runs and not found["SGLang"].runs and found["transformers"].runs
