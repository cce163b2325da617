from __future__ import annotations

import math
from pathlib import Path

import pytest

from loadstone.errors import UsageError
from loadstone.evaluation.results.gates import check_gates, judge, parse_gate
from loadstone.evaluation.results.metrics import (
    BY_GATE,
    CLASSIFICATION,
    LOSS,
    METRICS,
    REGRESSION,
    TEXT_GROUPS,
    Estimate,
    markdown,
    to_record,
)

DOCS = Path(__file__).parents[3] / "docs" / "eval.md"


def test_the_documentation_lists_every_metric() -> None:
    assert "\n".join(markdown()) in DOCS.read_text()


def test_keys_and_gates_are_unique() -> None:
    assert len({m.key for m in METRICS}) == len(METRICS)
    assert len(BY_GATE) == sum(bool(m.gate) for m in METRICS)


def test_every_gate_parses_by_its_name() -> None:
    for name, metric in BY_GATE.items():
        assert parse_gate(f"{name}>1").metric is metric
        if metric.fraction or metric.relative_to:
            assert parse_gate(f"{name}<2%").percent
        else:
            with pytest.raises(UsageError, match="% has no meaning"):
                parse_gate(f"{name}<2%")


def test_the_metrics_of_fitted_tables_are_those_that_are_measured() -> None:
    np = pytest.importorskip("numpy")
    from loadstone.context.tables.metrics import classification_metrics, regression_metrics

    found = classification_metrics(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([1, 0]))
    assert set(found) == {m.key for m in METRICS if CLASSIFICATION in m.groups}
    values = np.array([0.1, 0.5, 0.9])
    found = regression_metrics(values, values, values, values)
    assert set(found) == {m.key for m in METRICS if REGRESSION in m.groups}


def test_one_grammar_for_fitted_tables() -> None:
    figures = {"accuracy": 0.85, "log_loss": 0.4, "auc": None, "calibration_error": 0.02}
    for text, failed in (
        ("accuracy<0.9", True),
        ("accuracy<80%", False),
        ("ACCURACY <= 85 %", True),
        ("log_loss>4e-1", False),
        ("auc<0", True),  # undefined: it fails every gate
    ):
        gate = parse_gate(text)
        check_gates([gate], [CLASSIFICATION], "it")
        assert judge(gate, "c", figures).failed is failed, text
    for text, groups in (("loss>1", [CLASSIFICATION]), ("r2<0.5", [CLASSIFICATION]), ("r2<0.5", TEXT_GROUPS)):
        with pytest.raises(UsageError, match="has no"):
            check_gates([parse_gate(text)], groups, "it")


def test_a_record_has_every_key_and_null_for_what_is_not_finite() -> None:
    estimates = {m.key: Estimate(math.inf, math.nan, (1.0, math.inf)) for m in METRICS if LOSS in m.groups}
    record = to_record(LOSS, estimates)
    assert record["perplexity"] is None and record["loss_interval95"] == [1.0, None]
    assert record["loss_stderr"] is None and set(record) == set(to_record(LOSS, None))
    with pytest.raises(KeyError):
        to_record(LOSS, {})
