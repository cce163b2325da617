"""A plan made of earlier answers is the plan that finalize makes, and needs no torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loadstone
from loadstone.finalize import FinalizePlan, make_plan
from loadstone.finalize.plan import weight_dtype
from loadstone.memo import Memo
from loadstone.quantization import parse_recipe, read_recipe

from ..conftest import ARCHITECTURES
from .headers import write_headers
from .test_finalize import ON_CPU, W4

MIXED = """
default: intx4-weight-only
rules:
  - {modules: self_attn, scheme: int8-weight-only}
  - {modules: experts, scheme: float8-weight-only}
embeddings: intx4-weight-only:bits=8,group_size=0
lm_head: int8-weight-only
"""


def never() -> None:
    raise AssertionError("asked a library")


def plans(source: Path, recipe: object, folder: Path, **options: object) -> tuple[FinalizePlan, FinalizePlan]:
    """The plan as finalize makes it, and out of answers alone."""
    artifact = loadstone.detect(source)
    plain = make_plan(artifact, recipe, **options)  # type: ignore[arg-type]
    assert make_plan(artifact, recipe, memo=Memo(folder), **options) == plain  # type: ignore[arg-type]
    again = make_plan(artifact, recipe, memo=Memo(folder, never), **options)  # type: ignore[arg-type]
    return plain, again


@pytest.mark.parametrize("recipe", [None, *ON_CPU])
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "gpt2"])
def test_the_same_plan(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, recipe: str | None
) -> None:
    plain, again = plans(make_model(arch), parse_recipe(recipe) if recipe else None, tmp_path)
    assert again == plain
    assert [s.nbytes for s in again.steps] == [s.nbytes for s in plain.steps]


@pytest.mark.parametrize("arch", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize(
    "options", [{"skip": ["layers.0"]}, {"dtype": "float32"}, {"max_shard_bytes": 30_000}]
)
def test_the_same_plan_under_options(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, options: dict[str, object]
) -> None:
    plain, again = plans(make_model(arch), parse_recipe(W4), tmp_path, **options)
    assert again == plain


def test_the_same_plan_by_rules(make_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(MIXED)
    plain, again = plans(make_model("qwen3-moe"), read_recipe(file), tmp_path / "facts")
    assert again == plain and len({s.scheme for s in plain.steps}) == 4


def test_the_same_plan_of_a_bin_with_tied_weights(tiny: Path, tmp_path: Path) -> None:
    import torch

    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((tiny / "config.json").read_bytes())
    torch.save(loadstone.load(tiny).state_dict(), source / "pytorch_model.bin")
    plain, again = plans(source, parse_recipe(W4), tmp_path / "facts")
    assert again == plain and "lm_head.weight" not in {s.name for s in plain.steps}


def test_another_config_is_asked_about_anew(make_model: Callable[..., Path], tmp_path: Path) -> None:
    plans(make_model("llama-tied"), parse_recipe(W4), tmp_path)
    with pytest.raises(AssertionError, match="asked a library"):
        make_plan(loadstone.detect(make_model("llama-untied")), parse_recipe(W4), memo=Memo(tmp_path, never))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weight_dtype(make_model: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    artifact = loadstone.detect(make_model("llama-tied", dtype))
    assert weight_dtype(artifact, "auto", Memo(tmp_path)) == dtype
    assert weight_dtype(artifact, "auto", Memo(tmp_path, never)) == dtype
    assert weight_dtype(artifact, "float16") == "float16"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_again_imports_no_torch(tmp_path: Path, as_json: bool) -> None:
    write_headers(tmp_path / "headers")
    code = """
import sys
from loadstone.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"torch", "transformers", "torchao"} & set(sys.modules)), file=sys.stderr)
"""
    arguments = ["finalize", "-M", "headers", "--quantize", W4, "--dry-run", "--quiet", *["--json"] * as_json]

    def run(cache: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--device", "cpu"],
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": cache},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, done.stderr.splitlines()[-1]

    first, imported = run(str(tmp_path / "cache"))
    assert imported == "['torch', 'torchao', 'transformers']"
    again, imported = run(str(tmp_path / "cache"))
    assert again == first and imported == "[]"


def test_code_that_came_with_the_model_is_asked_anew(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = loadstone.detect(make_model("llama-tied"))
    monkeypatch.setattr(type(artifact), "needs_remote_code", True)
    make_plan(artifact, None, memo=Memo(tmp_path))
    assert weight_dtype(artifact, "auto", Memo(tmp_path)) == "bfloat16"
    assert not list(tmp_path.iterdir())
