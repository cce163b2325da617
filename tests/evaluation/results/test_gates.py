from __future__ import annotations

import math

import numpy as np
import pytest

from loadstone.errors import UsageError
from loadstone.evaluation.results.compare import Delta
from loadstone.evaluation.results.gates import judge, parse_gate

RECORD = {
    "loss": 2.05,
    "perplexity": math.exp(2.05),
    "bits_per_byte": 1.0,
    "delta_loss": 0.05,
    "delta_perplexity": math.exp(2.05) - math.exp(2.0),
    "delta_bits_per_byte": 0.02,
    "top1_agreement": 0.97,
}


def delta(spread: float = 0.0) -> Delta:
    tokens = np.full(50, 100.0)
    apart = (0.05 + spread * np.linspace(-1, 1, 50)) * tokens
    return Delta(np.stack([apart, tokens], 1), {})


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("dloss>0.03", True),
        ("dloss > 0.05", False),
        ("dloss>=0.05", True),
        ("dloss<.06", True),
        ("loss>2", True),
        ("ppl>7.8", False),
        ("ppl>7.7", True),
        ("bpb<=1", True),
        ("dppl>5.2%", False),
        ("dppl>5.1%", True),
        ("dppl>0.3", True),
        ("dloss>2.4%", True),
        ("dloss>2.6%", False),
        ("dbpb>2%", True),
        ("top1<98%", True),
        ("top1<0.96", False),
        ("DLOSS>3e-2", True),
    ],
)
def test_judgement(text: str, failed: bool) -> None:
    assert judge(parse_gate(text), "m", RECORD, delta()).failed is failed


def test_confidence_asks_for_the_bound() -> None:
    assert judge(parse_gate("dloss>0.03@95"), "m", RECORD, delta(0.02)).failed
    wide = judge(parse_gate("dloss>0.03@95"), "m", RECORD, delta(0.5))
    assert not wide.failed and wide.value < 0.03
    assert judge(parse_gate("dloss>0.03"), "m", RECORD, delta(0.5)).failed
    # The other way round, the upper bound has to be below.
    assert not judge(parse_gate("dloss<0.07@95"), "m", RECORD, delta(0.5)).failed
    assert judge(parse_gate("dppl>3%@95"), "m", RECORD, delta(0.02)).failed


def test_says_by_how_much() -> None:
    assert judge(parse_gate("dloss>0.03"), "m", RECORD, delta()).describe() == (
        "m: dloss>0.03 failed by 0.02 (0.05 against 0.03)"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_fails(value: float) -> None:
    assert judge(parse_gate("loss<0"), "m", RECORD | {"loss": value}).failed
    assert judge(parse_gate("loss>9"), "m", RECORD | {"loss": value}).failed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dloss",
        "dloss>",
        "dloss=3",
        "dloss>x",
        "agreement>3",
        "ppl>3%",
        "loss>3@95",
        "dloss>1%@95",
        "dloss>1@30",
        "dloss>1@100",
        "dloss>0.03@95x",
        "dloss>0.03 and ppl>3",
    ],
)
def test_wrong_gates_show_the_grammar(text: str) -> None:
    with pytest.raises(UsageError, match=r"METRIC > NUMBER|confidence must be"):
        parse_gate(text)


def test_what_compares() -> None:
    assert parse_gate("dppl>1%").compares and not parse_gate("ppl>3").compares
