"""Several ranks (gloo, on one machine) calibrate to the bytes that one gives, and go on where other ranks stopped."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import on_ranks

import loadstone
from loadstone.finalization import calibrate as calibration
from loadstone.finalization.statistics import Inputs, InputStatistics, divide
from loadstone.ranks import Ranks, joined

from .test_finalize import snapshot

TEXT = ["the quick brown fox jumps over the lazy dog and runs away, " + "x" * n for n in range(60)]
SERVED = {"layout": "compressed-tensors"}
CASES = {
    "gptq": ("llama-tied", {"recipe": "int8-dynamic-act-int4-weight", "algorithm": "gptq"}),
    "awq": ("llama-tied", {"recipe": "intx4-weight-only", "algorithm": "awq"}),
    "awq, inputs scaled": ("llama-tied", {"recipe": "int8-weight-only", "algorithm": "awq"}),
    "smoothquant": ("qwen2", {"recipe": "int8-dynamic-act-int8-weight", "algorithm": "smoothquant"}),
    "nvfp4": ("llama-tied", {"recipe": "nvfp4-dynamic-act-nvfp4-weight", **SERVED}),
    "experts": ("qwen3-moe", {"recipe": "intx4-weight-only", "algorithm": "gptq", **SERVED}),
}


def finalize(source: Path, out: Path, options: dict[str, object], rows: int = 7) -> None:
    loadstone.finalize(
        source,
        out,
        calibrate=TEXT,
        calibrate_tokens=128 * rows,
        device="cpu",
        max_shard_size="60kB",
        **options,
    )


def outlying(rows: int, columns: int) -> torch.Tensor:
    """Inputs of which a few features are far larger than the rest, as in trained models, and one is always zero."""
    torch.manual_seed(1)
    size = torch.ones(columns)
    size[::17] = 3000
    size[5] = 0
    return torch.randn(rows, columns) * size


def test_statistics_do_not_depend_on_the_order() -> None:
    x = outlying(640, 530)
    # Far smaller than the rest, so that float64 cannot hold sums with them as they are.
    x[100:129] *= 1e-6
    parts = x.split([100, 28, 1, 511])
    whole, found, turned = Inputs.of(x), Inputs.of(*parts), Inputs.of(*reversed(parts))
    exact = x.double()
    for name, wanted in (
        ("moment", exact.t() @ exact),
        ("total", exact.abs().sum(0)),
        ("largest", exact.abs().amax(0)),
    ):
        assert torch.equal(getattr(found, name), getattr(turned, name))
        scale = wanted.diagonal().sqrt() if name == "moment" else wanted
        scale = scale[:, None] * scale if name == "moment" else scale
        for each in (whole, found):
            assert ((getattr(each, name).double() - wanted).abs() <= 1e-6 * scale).all()
    assert whole.count == found.count == 640
    assert torch.equal(found.moment, found.moment.t())


def test_inputs_that_are_too_large_for_sums_are_noticed() -> None:
    x = outlying(64, 40)
    for times, fits in ((30.0, True), (1e6, False)):
        seen = InputStatistics(128)
        seen.see("a", x)
        seen.begin_sums(["a"])
        seen.see("a", x * times)
        assert seen.fits(["a"]) == fits and not seen.fits(["a", "b"])


def test_work_is_divided_evenly() -> None:
    owners = divide({"q": 4, "down": 14, "up": 8, "o": 2}, Ranks(0, 2))
    assert owners == {"down": 0, "up": 1, "q": 1, "o": 1}


def test_statistics_of_ranks_that_saw_other_keys(tmp_path: Path) -> None:
    """As with experts that get tokens of some rows only; a rank without rows takes part."""
    inputs = {"a": outlying(64, 40), "b": outlying(32, 700)}

    def work() -> None:
        with joined() as ranks:
            seen = InputStatistics(64)
            mine = {"a": inputs["a"][:30], "b": inputs["b"]} if ranks.rank == 0 else {"a": inputs["a"][30:]}
            mine = mine if ranks.rank < 2 else {}
            for key, x in mine.items():
                seen.see(key, x)
            seen.share_largest(ranks, "cpu")
            seen.begin_sums(seen.largest, exactly=True)
            for key, x in mine.items():
                seen.see(key, x)
            found = seen.add_up(ranks, {"a": 2, "b": 1})
            for key, alone in (("a", Inputs.of(*inputs["a"].split([30, 34]))), ("b", Inputs.of(inputs["b"]))):
                assert torch.equal(found[key].total, alone.total) and found[key].count == alone.count
                assert (found[key].moment is None) == (ranks.rank != {"a": 2, "b": 1}[key])
                if found[key].moment is not None:
                    assert torch.equal(found[key].moment, alone.moment)

    on_ranks(3, work)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(
            case, size, marks=[] if (case, size) in (("gptq", 2), ("experts", 3)) else pytest.mark.slow
        )
        for case in CASES
        for size in (2, 3, 4)
    ],
)
def test_ranks_give_the_bytes_of_one(
    make_model: Callable[..., Path], tmp_path: Path, case: str, size: int
) -> None:
    arch, options = CASES[case]
    source = make_model(arch)
    finalize(source, tmp_path / "out", options)
    one = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "one")
    on_ranks(size, lambda: finalize(source, tmp_path / "out", options))
    assert snapshot(tmp_path / "out") == one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["awq", "nvfp4", "experts"])
def test_ranks_without_rows_take_part(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    arch, options = CASES[case]
    source = make_model(arch)
    on_ranks(4, lambda: finalize(source, tmp_path / "out", options, rows=2))
    found = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "four")
    finalize(source, tmp_path / "out", options, rows=2)
    assert snapshot(tmp_path / "out") == found


@pytest.mark.slow
def test_ranks_that_sum_again_give_the_bytes_of_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadstone.finalization.statistics._ROOM", 0.5)
    test_ranks_give_the_bytes_of_one(lambda arch: tiny, tmp_path, "awq", 2)


@pytest.mark.parametrize("same", [True, False])
def test_copies_of_the_source_on_other_nodes(
    make_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture, same: bool
) -> None:
    """Two nodes of one rank each have copies of the source, and share the output."""
    arch, options = CASES["gptq"]
    for name in ("a", "b"):
        shutil.copytree(make_model(arch), tmp_path / name)
    weights = tmp_path / "b" / "model.safetensors"
    if not same:
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    os.utime(weights, (1, 1))

    def work() -> None:
        source = "ab"[int(os.environ["RANK"])]
        os.environ["LOCAL_RANK"] = "0"
        finalize(tmp_path / source, tmp_path / "out", options)

    codes = on_ranks(2, work, check=same)
    assert (tmp_path / "out").exists() == same
    if same:
        finalize(tmp_path / "a", tmp_path / "one", options)
        found, one = snapshot(tmp_path / "out"), snapshot(tmp_path / "one")
        assert found == one
    else:
        assert codes == [1, 1] and "has other weights than that on" in capfd.readouterr().err


def test_ranks_with_other_options_are_refused(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    def work() -> None:
        dtype = ("bfloat16", "float32")[int(os.environ["RANK"])]
        loadstone.finalize(tiny, tmp_path / "out", dtype=dtype)

    assert on_ranks(2, work, check=False) == [1, 1]
    assert "is another than on" in (err := capfd.readouterr().err) and "dtype, layout differ" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_killed_rank_and_other_ranks_that_go_on(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    after: int,
) -> None:
    """The last rank is killed in the second layer; what goes on takes the first over, and gives the same bytes."""
    arch, options = CASES["gptq"]
    source = make_model(arch)
    finalize(source, tmp_path / "out", options)
    whole = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    rounding = calibration.round_layer

    def killed() -> None:
        rounded = []

        def round_layer(*args: object) -> object:
            rounded.append(args)
            if len(rounded) == 2 and os.environ.get("RANK") == str(before - 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return rounding(*args)

        calibration.round_layer = round_layer
        finalize(source, tmp_path / "out", options)

    codes = on_ranks(before, killed, check=False)
    assert codes.pop() == -signal.SIGKILL and all(code > 0 for code in codes)
    (notes,) = (tmp_path / ".out.calibrated").iterdir()
    assert [p.name for p in notes.glob("0*.json")] == ["00000.json"]
    files = [notes / name for name in json.loads((notes / "00000.json").read_text())]
    assert len(files) == before
    times = [file.stat().st_mtime_ns for file in files]

    def round_layer(*args: object) -> object:
        assert [file.stat().st_mtime_ns for file in files] == times
        return rounding(*args)

    monkeypatch.setattr(calibration, "round_layer", round_layer)
    on_ranks(after, lambda: finalize(source, tmp_path / "out", options))
    assert snapshot(tmp_path / "out") == whole
