"""Metrics of divergence, and the documents that a model does worst on, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loadstone.evaluation.results.compare import Units
from loadstone.evaluation.results.metrics import DIVERGENCE, Estimate, to_record
from loadstone.evaluation.results.statistics import ratio, sums_between
from loadstone.text.arrays import Arrays
from loadstone.text.stream import TokenStream

_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999, "kl_max": 1.0}
# Tokens before the worst one, and characters of them that are shown.
_BEFORE, _EXCERPT = 40, 160
# Bytes of a character in UTF-8.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Token:
    """A token of text: its ``text`` and its ``value``, in nats."""

    text: str
    value: float


def divergence_record(values: Arrays, units: Units) -> dict[str, Any]:
    """The divergence keys of a model's JSON record, from `score_pair`'s values."""
    estimates = {}
    for key, source in (("kl", "kl"), ("kl_reverse", "kl_reverse"), ("top1_agreement", "top1")):
        found = ratio(units.sums(values[source]), units.tokens)
        estimates[key] = Estimate(found.value, found.stderr)
    quantiles = np.quantile(values["kl"], list(_QUANTILES.values()))
    estimates |= {key: Estimate(float(q)) for key, q in zip(_QUANTILES, quantiles, strict=True)}
    return to_record(DIVERGENCE, estimates)


def worst_documents(values: Arrays, stream: TokenStream, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The documents with the highest mean KL, worst first, each with the text around its worst token."""
    found = []
    for document, mean in rank_documents(values["kl"], stream, count):
        mine = slice(*stream.slots[document : document + 2])
        worst = int(values["kl"][mine].argmax())
        apart = values["nll"][mine] - values["nll_reference"][mine]
        ids = stream.text(document, worst + 1)
        found.append(
            {
                "document": document,
                "kl": mean,
                "delta_loss": float(apart.mean(dtype=np.float64)),
                "tokens": len(apart),
                "worst_token_kl": float(values["kl"][mine][worst]),
                "worst_token": tokenizer.decode([int(ids[-1])]),
                "before": tokenizer.decode(ids[-1 - _BEFORE : -1].tolist())[-_EXCERPT:],
            }
        )
    return found


def rank_documents(values: np.ndarray, stream: TokenStream, count: int) -> list[tuple[int, float]]:
    """The ``count`` documents with the highest mean of per-token ``values`` (tokens,), highest first: (index, mean)."""
    tokens = stream.tokens.texts
    mean = sums_between(stream.slots, lambda some: values[some]) / np.maximum(tokens, 1)
    order = [int(d) for d in np.argsort(-mean, kind="stable") if tokens[d]]
    return [(d, float(mean[d])) for d in order[:count]]


def document_tokens(
    document: int, values: np.ndarray, stream: TokenStream, tokenizer: Any, limit: int
) -> list[Token]:
    """The first ``limit`` tokens of a document with the value of each, in reading order.

    Bytes of one character may be several tokens: these are joined into one `Token` with the sum of their values.
    """
    ids = stream.text(document, limit).tolist()
    first = int(stream.slots[document])
    each = values[first : first + len(ids)].astype(np.float64)
    found: list[Token] = []
    start = 0
    for end in range(1, len(ids) + 1):
        # Decoded after its predecessor: some tokenizers drop the space before a text's first token.
        before = tokenizer.decode(ids[max(0, start - 1) : start])
        text = tokenizer.decode(ids[max(0, start - 1) : end])[len(before) :]
        if text.endswith("�") and end - start < _LONGEST_CHARACTER and end < len(ids):
            continue
        found.append(Token(text, float(each[start:end].sum())))
        start = end
    return found
