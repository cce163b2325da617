"""What is written is what is read; anything else is refused, by its own type and by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.context.conftest import random_pfn, write_pfn
from torch import Tensor

import loadstone
from loadstone.artifact.context_errors import (
    ArchitectureMismatch,
    BaseMismatch,
    CorruptContext,
    FormatUnsupported,
    ProbeFailed,
    SchemaMismatch,
    UnsafeContent,
)
from loadstone.artifact.context_file import digest
from loadstone.context import load_context
from loadstone.context.pfn.bases import load_base
from loadstone.context.pfn.layout import context_tensors, total_bytes
from loadstone.context.pfn.model import PFN
from loadstone.errors import ArtifactError, MissingError, UsageError

Rows = Callable[..., tuple[Tensor, Tensor]]
QUERIES = torch.rand(5, 4, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def fitted(pfn_dir: Path, rows: Rows, tmp_path: Path) -> Path:
    """A saved regression context of the base in ``pfn_dir``."""
    x, y = rows(12, 4)
    return load_base(pfn_dir, device="cpu").fit(x, y, feature_names=list("abcd")).save(tmp_path / "fitted")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change context.json as its writer would have: with a digest that fits."""
    file = directory / "context.json"
    facts = json.loads(file.read_text())
    change(facts)
    facts["digest"] = digest(facts)
    file.write_text(json.dumps(facts))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors, with a hash that fits."""
    file = directory / "context.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    entry = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    edit(directory, lambda facts: facts.update(files={file.name: entry}))


@pytest.mark.parametrize("cache", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_round_trips(pfn_dir: Path, rows: Rows, tmp_path: Path, task: str, cache: str | None) -> None:
    x, y = rows(30, 4)
    x[3, 2] = torch.nan
    if task == "classification":
        y = (y * 2).long()
    base = load_base(pfn_dir, device="cpu")
    context = base.fit(x, y, cache_dtype=cache, seed=11)
    first = load_context(context.save(tmp_path / "one"))
    second = load_context(first.save(tmp_path / "two"), base=pfn_dir)
    expected = context.logits(QUERIES)
    assert torch.equal(first.logits(QUERIES), expected) and torch.equal(second.logits(QUERIES), expected)
    assert first.classes == context.classes and first.seed == 11 and first.nbytes == context.nbytes
    one, two = (tmp_path / n / "context.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    # One base, one set of parameters, whoever loads it and however it is named.
    assert first.model is second.model is base
    assert {p.data_ptr() for p in first.model.parameters()} == {p.data_ptr() for p in base.parameters()}


def test_fresh_process(fitted: Path) -> None:
    expected = load_context(fitted).posterior(QUERIES).mean
    script = (
        "import sys, torch, loadstone; c = loadstone.load_context(sys.argv[1]); "
        "q = torch.rand(5, 4, generator=torch.Generator().manual_seed(9)); torch.set_num_threads(1); "
        "print(c.posterior(q).mean.tolist()); print([m for m in sys.modules if 'transformers' in m][:1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(fitted)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[0]) == expected.tolist()


def test_size_is_known_before_and_no_weight_is_in_it(pfn_dir: Path, rows: Rows, tmp_path: Path) -> None:
    base = load_base(pfn_dir, device="cpu")
    for cache, d in (("float32", 4), ("int8", 60), ("bfloat16", 17)):
        x, y = rows(300, d)
        context = base.fit(x, y, cache_dtype=cache)
        planned = context_tensors(
            base.config, task="regression", rows=300, features=d, classes=0,
            cache=context.cache_dtype, model=torch.float32,
        )  # fmt: skip
        path = context.save(tmp_path / f"{cache}{d}")
        written = path / "context.safetensors"
        assert abs(total_bytes(planned) / written.stat().st_size - 1) < 0.01
        assert abs(total_bytes(planned) / context.nbytes - 1) < 0.01
        assert set(load_file(written)) == set(planned)
        content = written.read_bytes()
        for name, parameter in base.state_dict().items():
            assert parameter.numel() < 16 or parameter.numpy().tobytes() not in content, name


def test_bases_are_found_but_never_guessed(fitted: Path, pfn_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pfn_dir, moved)
    edit(fitted, lambda facts: facts["base"].update(source=str(tmp_path / "gone")))
    held = load_base(pfn_dir, device="cpu")
    assert load_context(fitted, device="cpu").model is held
    assert load_context(fitted, base=moved).model is not held
    edit(fitted, lambda f: f["base"]["tensors"]["norm.bias"].__setitem__(2, "0" * 64))
    with pytest.raises(MissingError, match="is not here"):
        load_context(fitted, device="cpu")


def changed(model: PFN, change: Callable[[PFN], object]) -> PFN:
    change(model)
    return model


def test_other_bases_are_refused(fitted: Path, tmp_path: Path) -> None:
    cases: list[tuple[PFN, type[Exception], str]] = [
        (random_pfn(seed=1), BaseMismatch, "'None' has other values in 'classification_head"),
        (random_pfn(layers=2), ArchitectureMismatch, r"layers 2 \(fitted with 3\)"),
        (random_pfn(layers=4), ArchitectureMismatch, r"layers 4 \(fitted with 3\)"),
        (random_pfn(width=64), ArchitectureMismatch, r"width 64 \(fitted with 32\)"),
        (random_pfn(heads=2), ArchitectureMismatch, r"heads 2 \(fitted with 4\)"),
        (random_pfn(bars=21), ArchitectureMismatch, "bars 21"),
        (random_pfn().double(), BaseMismatch, "float64, the context was fitted in float32"),
    ]

    def nudge(model: PFN) -> None:
        with torch.no_grad():
            model.layers[1].up.weight[3, 4] += 1e-6  # type: ignore[index, union-attr]

    def drop(model: PFN) -> None:
        del model.layers[0].norm_mlp.bias  # type: ignore[union-attr]
        model.layers[0].norm_mlp.register_parameter("bias", None)  # type: ignore[union-attr]

    def rename(model: PFN) -> None:
        model.other_norm = model.norm
        del model.norm

    cases += [
        (changed(random_pfn(), nudge), BaseMismatch, r"other values in 'layers.1.up.weight'"),
        (changed(random_pfn(), drop), BaseMismatch, r"lacks 'layers.0.norm_mlp.bias'"),
        (
            changed(random_pfn(), rename),
            BaseMismatch,
            r"lacks 'norm.bias', 'norm.weight' and has besides 'other_norm",
        ),
    ]
    for base, error, says in cases:
        with pytest.raises(error, match=says):
            load_context(fitted, base=base)
    # From disk as well, and a directory whose weights were replaced since.
    other = write_pfn(random_pfn(seed=2), tmp_path / "other")
    with pytest.raises(BaseMismatch, match="other values"):
        load_context(fitted, base=other)
    load_context(fitted, base=random_pfn())


# ruff: noqa: E501
DAMAGE: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "flipped bit in the tensors": (CorruptContext, "sha256", lambda d: flip(d / "context.safetensors", -50)),
    "flipped bit in a tensor's header": (ArtifactError, "", lambda d: flip(d / "context.safetensors", 40)),
    "flipped bit in the description": (CorruptContext, "", lambda d: flip(d / "context.json", 400)),
    "truncated": (CorruptContext, "context.safetensors", lambda d: cut(d / "context.safetensors", 100)),
    "truncated description": (CorruptContext, "context.json", lambda d: cut(d / "context.json", 100)),
    "no tensors": (CorruptContext, "missing", lambda d: (d / "context.safetensors").unlink()),
    "newer format": (FormatUnsupported, "version 2", lambda d: edit(d, lambda f: f.update(format_version=2))),
    "no version": (CorruptContext, "does not describe", lambda d: edit(d, lambda f: f.pop("format_version"))),
    "other kind": (FormatUnsupported, "'llm-x'", lambda d: edit(d, lambda f: f.update(kind="llm-x"))),
    "path that escapes": (
        UnsafeContent,
        "names the file",
        lambda d: edit(d, lambda f: f["files"].update({"../../x.safetensors": {"sha256": "", "bytes": 1}})),
    ),
    "planted pickle": (UnsafeContent, "extra.pkl", lambda d: (d / "extra.pkl").write_bytes(b"cos\nsystem\n.")),
    "planted joblib": (UnsafeContent, "a.JOBLIB", lambda d: (d / "a.JOBLIB").write_bytes(b"x")),
    "pickle for tensors": (CorruptContext, "", lambda d: pickled(d)),
    "fp8 cache": (FormatUnsupported, "float8_e4m3fn", lambda d: edit(d, lambda f: f["cache"].update(dtype="float8_e4m3fn"))),
    "other dtype": (FormatUnsupported, "float16", lambda d: edit(d, lambda f: f["numerics"].update(dtype="float16"))),
    "other rows": (CorruptContext, "shape", lambda d: edit(d, lambda f: f.update(rows=13))),
    "absurd rows": (CorruptContext, "shape", lambda d: edit(d, lambda f: f.update(rows=10**12))),
    "absurd width": (CorruptContext, "sizes", lambda d: edit(d, lambda f: f["base"]["architecture"].update(width=10**9))),
    "unknown task": (CorruptContext, "task", lambda d: edit(d, lambda f: f.update(task="clustering"))),
    "missing key": (CorruptContext, "'base'", lambda d: edit(d, lambda f: f.pop("base"))),
    "malformed fingerprint": (CorruptContext, "base", lambda d: edit(d, lambda f: f["base"].update(tensors={"a": 1}))),
    "missing tensor": (CorruptContext, "'layers.1.values' is missing", lambda d: rewrite(d, lambda t: t.pop("layers.1.values"))),
    "renamed tensor": (CorruptContext, "'codes' is missing", lambda d: rewrite(d, lambda t: t.update(code=t.pop("codes")))),
    "extra tensor": (CorruptContext, "'weight' does not", lambda d: rewrite(d, lambda t: t.update(weight=torch.ones(2)))),
    "not a number": (CorruptContext, "layers.0.keys", lambda d: rewrite(d, lambda t: t["layers.0.keys"].fill_(torch.nan))),
    "other values, well hashed": (ProbeFailed, "probe", lambda d: rewrite(d, lambda t: t["layers.0.values"].mul_(-3))),
}  # fmt: skip


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def cut(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def pickled(directory: Path) -> None:
    """A pickle that would leave a mark if anything unpickled it."""
    mark = directory.parent / "executed"
    code = f"cbuiltins\nexec\n(Vopen({str(mark)!r}, 'w')\ntR.".encode()
    (directory / "context.safetensors").write_bytes(code)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(fitted: Path, name: str) -> None:
    error, says, harm = DAMAGE[name]
    harm(fitted)
    with pytest.raises(error) as refused:
        load_context(fitted)
    assert isinstance(refused.value, ArtifactError) and refused.value.exit_code == 3
    assert says in str(refused.value), refused.value
    assert not (fitted.parent / "executed").exists()


def test_link_out_of_the_directory(fitted: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.safetensors"
    (fitted / "context.safetensors").rename(target)
    (fitted / "context.safetensors").symlink_to(target)
    with pytest.raises(UnsafeContent, match="leaves the directory"):
        load_context(fitted)


def test_wrong_features_are_refused(fitted: Path) -> None:
    context = load_context(fitted)
    for shape in ((3, 5), (3, 3), (4, 1), ()):
        with pytest.raises(SchemaMismatch, match="features"):
            context.logits(torch.zeros(shape))
    with pytest.raises(UsageError, match="not infinite"):
        context.logits(torch.full((1, 4), torch.inf))


def test_outputs_appear_whole_or_not_at_all(
    fitted: Path, pfn_dir: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = load_context(fitted)
    before = (fitted / "context.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        context.save(fitted)
    with pytest.raises(UsageError, match="not a fitted context"):
        context.save(pfn_dir, overwrite=True)
    with pytest.raises(UsageError, match="gradients"):
        load_base(pfn_dir, device="cpu").fit(
            *(t.requires_grad_() for t in rows(6, 2)), grad_context=True
        ).save(tmp_path / "graph")
    monkeypatch.setattr("loadstone.writing.contexts.sha256_file", lambda *_: 1 / 0)
    for out in (fitted, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            context.save(out, overwrite=True)
    monkeypatch.undo()
    assert (fitted / "context.json").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"fitted"}
    context.save(fitted, overwrite=True)
    assert load_context(fitted).rows == 12


def test_saving_needs_no_second_cache(pfn_dir: Path, rows: Rows, tmp_path: Path) -> None:
    from dataclasses import replace

    from loadstone.context.pfn.layer_cache import LayerCache
    from loadstone.evaluation.measure import peak_bytes, reset_peak

    context = load_base(pfn_dir, device="cpu").fit(*rows(8, 4))
    many = 40_000
    layers = tuple(
        LayerCache(*(torch.rand(*t.shape[:2], many, t.shape[3]) for t in layer.tensors().values()))
        for layer in context.layers
    )
    large = replace(context, rows=many, layers=layers)
    large.logits(QUERIES)
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_bytes(cpu)
    large.save(tmp_path / "large")
    assert large.nbytes > 90e6 and peak_bytes(cpu) - before < 0.1 * large.nbytes


def test_a_context_is_no_model(fitted: Path, pfn_dir: Path) -> None:
    assert loadstone.detect(fitted).kind == "context" and loadstone.detect(pfn_dir).kind == "pfn"
    with pytest.raises(ArtifactError, match="load_context"):
        loadstone.load(fitted)
    with pytest.raises(UsageError, match="not a fitted context"):
        load_context(pfn_dir)


def test_nothing_here_can_unpickle() -> None:
    """Of all modules that a context passes through on its way in."""
    root = Path(loadstone.__file__).parent
    modules = [*root.rglob("context/**/*.py"), root / "artifact/context_file.py"]
    assert len(modules) > 12
    for module in modules:
        text = module.read_text()
        for word in (
            "pickle",
            "joblib",
            "dill",
            "torch.load",
            "exec(",
            "eval(",
            "__import__",
            "marshal",
            "shelve",
        ):
            lines = [line for line in text.splitlines() if word in line and not line.lstrip().startswith("#")]
            lines = [line for line in lines if ".eval()" not in line and "_UNSAFE_SUFFIXES = " not in line]
            lines = [line for line in lines if "import" in line or f"{word}" in line.split('"')[0]]
            assert not lines, (module.name, lines)


def test_damaged_base_is_refused(pfn_dir: Path, tmp_path: Path) -> None:
    state = load_file(pfn_dir / "model.safetensors")

    def write(name: str, tensors: dict[str, Tensor]) -> Path:
        directory = tmp_path / name
        shutil.copytree(pfn_dir, directory)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    short = {k: v for k, v in state.items() if k != "norm.bias"}
    for directory, says in (
        (write("short", short), "'norm.bias' is missing"),
        (write("long", state | {"surplus": torch.ones(1)}), "'surplus' is not part of a PFN"),
        (write("bent", state | {"norm.bias": torch.ones(5)}), r"'norm.bias' is \[5\]"),
        (write("nan", state | {"norm.bias": torch.full((32,), torch.nan)}), "norm.bias"),
    ):
        with pytest.raises(ArtifactError, match=says):
            loadstone.load(directory, device="cpu")
