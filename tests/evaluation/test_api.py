"""`loadstone.evaluate`, called as a user's script calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loadstone
from loadstone.errors import UsageError


def test_compares_models(model_dir: Path, worse_dir: Path) -> None:
    steps: list[int] = []

    def progress(label: str, total: int):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext(steps.append)

    result = loadstone.evaluate(
        worse_dir,
        baseline=model_dir,
        limit=2,
        batch_size=4,
        fail_if=["dloss>-9", "loss>99"],
        progress=progress,
    )
    base, worse = result.records
    assert (base["path"], worse["path"]) == (str(model_dir), str(worse_dir)) and base["reference"]
    assert worse["delta_loss"] == pytest.approx(worse["loss"] - base["loss"], abs=1e-12)
    assert [v.gate for v in result.failures] == ["dloss>-9"]
    assert sum(steps) == 2 * result.protocol["tokens"]
    written = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(written) == {"protocol", "models", "gates"} and written["models"][0]["loss"] == base["loss"]


def test_one_model_or_a_list_of_them(model_dir: Path) -> None:
    alone, listed = (loadstone.evaluate(m, limit=1) for m in (str(model_dir), [model_dir]))
    assert alone.records[0]["loss"] == listed.records[0]["loss"] and not alone.verdicts
    assert len(loadstone.evaluate(model_dir, limit=1, fail_if="loss>0").failures) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "neither a positive number nor auto"),
        ({"batch_size": "many"}, "neither a positive number nor auto"),
        ({"base": "x"}, "--base x is for contexts"),
        ({"fail_if": ["accuracy<1"]}, "a language model has no accuracy"),
        ({"fail_if": ["dloss>1"]}, "needs a baseline"),
        ({"report": __file__}, "is a file"),
    ],
)
def test_wrong_use(model_dir: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loadstone.evaluate(model_dir, limit=1, **options)  # type: ignore[arg-type]
