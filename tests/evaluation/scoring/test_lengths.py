"""Each row gets what it gets alone where frequencies depend on the longest row of a batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.errors import UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64, "factor": 2.0,
}  # fmt: skip


@pytest.fixture
def documents(tmp_path: Path) -> str:
    from loadstone.text.corpus import read_corpus

    text = " ".join(read_corpus(limit=4).documents)
    # Lengths on both sides of 64 tokens, a long one beside each short one.
    rows = [text[i * 400 : i * 400 + n] for i, n in enumerate((60, 420, 75, 330, 90, 440, 105, 380))]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def alone(model: Any, task: Any) -> np.ndarray:
    """A fresh float64 model for each window."""
    stream, windows = task.stream, task.windows
    losses = np.full(len(stream.ids), np.nan)
    for start, length, first in zip(windows.start, windows.length, windows.first, strict=True):
        ids = torch.from_numpy(stream.ids[start : start + length])[None]
        with torch.no_grad():
            log_p = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for at in range(first, start + length + 1):
            losses[at] = -log_p[at - 1 - start, stream.ids[at]]
    return losses[stream.scored]


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_rows_of_other_lengths_do_not_matter(
    model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path, documents: str, rope: dict[str, Any]
) -> None:
    limit = 64 if rope is DYNAMIC else 128
    model = model_factory(rope_parameters=dict(rope), max_position_embeddings=limit)
    path = str(save_model(model, tokenizer, tmp_path / "m"))
    expected = None
    for batch, stream in ((1, False), (8, False), (3, True)):
        found = run(
            Options((path,), data=documents, protocol="rolling", context_length=128, batch_size=batch, stream=stream)
        )  # fmt: skip
        if expected is None:
            lengths = found.task.windows.length
            assert (lengths <= 64).sum() > 1 and (lengths > 64).sum() > 1
            expected = alone(model.double(), found.task)
        assert np.abs(found.values[path]["nll"] - expected).max() < 1e-4


def test_contexts_beyond_what_a_model_was_made_for(
    model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path, documents: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Rotary embeddings are computed for any position, with one warning; rows of a table are not."""
    options = {"data": documents, "context_length": 96}
    path = str(save_model(model_factory(max_position_embeddings=64), tokenizer, tmp_path / "rope"))
    with caplog.at_level("WARNING", logger="loadstone"):
        found = run(Options((path,), **options))  # type: ignore[arg-type]
    assert found.task.protocol.context_length == 96
    assert [r.getMessage() for r in caplog.records if "more than the 64 positions" in r.getMessage()] != []
    assert sum("positions" in r.getMessage() for r in caplog.records) == 1
    # Without the option the limit holds.
    assert run(Options((path,), data=documents)).task.protocol.context_length == 64
    path = str(save_model(model_factory(family="gpt2"), tokenizer, tmp_path / "learned"))
    with pytest.raises(UsageError, match="--context-length 160 is more than the 128 positions"):
        run(Options((path,), data=documents, context_length=160))
