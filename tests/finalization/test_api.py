"""`loadstone.finalize` and `loadstone.plan_finalize`: each option, and the errors for wrong ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import loadstone
import loadstone.finalization
from loadstone.errors import ArtifactError, LoadstoneError, UsageError
from loadstone.finalization.api import parse_size
from loadstone.quantization import parse_recipe, read_recipe

from .test_finalize import W4, weights


def test_the_function_is_the_packages_own() -> None:
    assert loadstone.finalize is loadstone.finalization.finalize
    assert loadstone.plan_finalize is loadstone.finalization.plan_finalize


def test_a_recipe_in_every_form_gives_the_same_bytes(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"default: {W4}\n")
    expected = weights(quantize_to(tiny, W4))
    for number, recipe in enumerate((W4, parse_recipe(W4), file, str(file), read_recipe(file))):
        done = loadstone.finalize(tiny, tmp_path / str(number), recipe=recipe)
        assert weights(done.out) == expected
        assert set(done.files) == set(expected) and done.verified is None


def test_progress_comes_by_stages(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    text = ["One two three, four five six. " * 400]
    done = loadstone.finalize(
        tiny,
        str(tmp_path / "out"),
        recipe="intx4-weight-only",
        calibrate=text,
        calibrate_tokens=1024,
        verify=True,
        on_progress=lambda *step: seen.append(step),
    )
    assert done.plan.recipe == parse_recipe("intx4-weight-only:rounding=gptq")
    assert done.verified == len(loadstone.detect(done.out).tensors)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["calibrate", "write", "verify"]
    for stage in stages:
        counts = [count for name, count, _ in seen if name == stage]
        (total,) = {total for name, _, total in seen if name == stage}
        assert counts == sorted(counts) and counts[-1] == total
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_plan_writes_nothing_and_is_what_is_done(tiny: Path, tmp_path: Path) -> None:
    options = {"recipe": W4, "skip": ["down_proj"], "dtype": "float32", "max_shard_size": "100KB"}
    plan = loadstone.plan_finalize(tiny, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir()) and len(plan.shards) > 1
    done = loadstone.finalize(tiny, tmp_path / "out", **options)
    assert done.plan == plan
    assert json.loads((done.out / "config.json").read_text()) == plan.config


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), ("200KB", 200_000), ("200kB", 200_000),
        ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("1.5 MB", 1_500_000), ("1TB", 10**12), ("4096", 4096),
        ("64B", 64), (12345, 12345),
    ],
)  # fmt: skip
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "big", "0", "0GB", "-1", -5, "5XB", "5iB", "1e9", "GB", "5 G B"])
def test_what_is_not_a_size(text: str | int) -> None:
    with pytest.raises(UsageError, match="500MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"recipe": "int8-weight"}, UsageError, "Did you mean 'int8-weight-only'"),
        ({"recipe": "none.yaml"}, UsageError, "there is no recipe file"),
        ({"recipe": object()}, UsageError, "a object is not a recipe. Give its name"),
        ({"recipe": W4, "skip": "nowhere"}, UsageError, "--skip nowhere matches no Linear"),
        ({"algorithm": "mse"}, UsageError, "--algorithm is about quantization"),
        ({"skip": ["mlp"]}, UsageError, "--skip is about quantization"),
        ({"calibrate": ["text"]}, UsageError, "--calibrate is about quantization"),
        ({"recipe": W4, "algorithm": "gptq"}, UsageError, "needs text to calibrate with"),
        ({"recipe": W4, "calibrate": ["text"]}, UsageError, "calibration tokens"),
        ({"recipe": W4, "algorithm": "best"}, UsageError, "--algorithm best is not possible"),
        ({"max_shard_size": "big"}, UsageError, "is not a size"),
        ({"dtype": "int4"}, UsageError, "float32"),
        ({"device": "tpu"}, LoadstoneError, "tpu"),
        ({"checkpoint": "best"}, LoadstoneError, "checkpoint"),
    ],
)
def test_wrong_options(
    tiny: Path, tmp_path: Path, options: dict[str, object], error: type[LoadstoneError], says: str
) -> None:
    with pytest.raises(error, match=says):
        loadstone.finalize(tiny, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_output_is_checked_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadstone.finalization.api.make_plan", lambda *args, **options: 1 / 0)
    with pytest.raises(UsageError, match="--overwrite"):
        loadstone.finalize(tiny, tmp_path, recipe=W4)
    with pytest.raises(UsageError, match="overlap"):
        loadstone.finalize(tiny, tiny / "out", recipe=W4)
    other = Path(shutil.copytree(tiny, tmp_path / "aqlm"))
    config = json.loads((tiny / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "aqlm"}
    }
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="already quantized"):
        loadstone.plan_finalize(other, recipe=W4)
