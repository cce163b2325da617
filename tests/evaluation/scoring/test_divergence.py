from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.errors import ArtifactError, UsageError
from loadstone.evaluation.results.compare import make_units
from loadstone.evaluation.results.documents import divergence_record, worst_documents
from loadstone.evaluation.scoring.divergence import Divergence, score_pair
from loadstone.evaluation.scoring.losses import BatchMaker, Values, plan_batches, score
from loadstone.text.corpus import read_corpus
from loadstone.text.stream import TokenStream
from loadstone.text.tokenizing import tokenize
from loadstone.text.tokens import make_protocol, make_windows


def noisy(model: Any, scale: float = 0.02) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn_like(p))
    return other


def run(a: Any, b: Any, stream: TokenStream, protocol: Any, **options: Any) -> Values:
    windows = make_windows(stream, protocol)
    maker = BatchMaker(stream, protocol, windows, torch.device("cpu"))
    return score_pair(a, b, maker, plan_batches(windows, 3), names=("a", "b"), **options)[0]


def test_agrees_with_float64(model: Any, tokenizer: Any) -> None:
    """KL both ways to 1e-6 relative of a float64 computation from the same logits, token by token."""
    other = noisy(model, 0.002)
    stream = tokenize(read_corpus(limit=2), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    values = run(model, other, stream, protocol)
    expected: dict[str, list[float]] = {"kl": [], "kl_reverse": [], "top1": []}
    windows = make_windows(stream, protocol)
    for start, length in zip(windows.start, windows.length, strict=True):
        ids = torch.from_numpy(stream.ids[start : start + length])[None]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].numpy().astype(np.float64) for m in (model, other))
        text = stream.document[start + 1 : start + length + 1] >= 0
        p, q = p[text], q[text]
        expected["top1"] += list(p.argmax(-1) == q.argmax(-1))
        p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        expected["kl"] += list((np.exp(p) * (p - q)).sum(-1))
        expected["kl_reverse"] += list((np.exp(q) * (q - p)).sum(-1))
    for name, wanted in expected.items():
        assert values[name].mean() == pytest.approx(np.mean(wanted), rel=1e-6), name
        # Batched windows round their logits a little differently from single ones.
        assert np.allclose(values[name], wanted, rtol=1e-2, atol=1e-6), name
    assert 1e-5 < values["kl"].mean() < 0.1 and 0.5 < values["top1"].mean() < 1


def test_kernel_against_float64_to_1e_12() -> None:
    torch.manual_seed(0)
    p, q = 8 * torch.randn(50, 1000), 8 * torch.randn(50, 1000)
    diverge = Divergence()
    # Buffers are used again, also for fewer rows.
    diverge(q, q, torch.zeros(50, dtype=torch.long))
    p, q = p[:40], q[:40]
    got = diverge(p, q, torch.zeros(40, dtype=torch.long))
    lp, lq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert torch.allclose(got["kl"], (lp.exp() * (lp - lq)).sum(-1), rtol=1e-12)
    assert torch.allclose(got["kl_reverse"], (lq.exp() * (lq - lp)).sum(-1), rtol=1e-12)


def test_logits_of_a_few_rows_at_a_time(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is O(chunk x vocabulary): the context may be as long as it likes."""
    other = noisy(model)
    stream = tokenize(read_corpus(limit=2), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    whole = run(model, other, stream, protocol)
    held: list[int] = []
    real = Divergence.__call__

    def spy(
        self: Divergence, p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        held.append(len(p))
        return real(self, p, q, targets)

    monkeypatch.setattr(Divergence, "__call__", spy)
    monkeypatch.setattr("loadstone.evaluation.scoring.divergence.chunk_rows", lambda model, device: 40)
    chunked = run(model, other, stream, protocol)
    assert max(held) == 10 and len(held) > 100
    assert np.allclose(chunked["kl"], whole["kl"], rtol=1e-3, atol=1e-7)


def test_memory_does_not_grow_with_the_text() -> None:
    """Chunks of 8 MB logits over a vocabulary of 262,144: the heap keeps nothing of what they need."""
    code = (
        "import torch; from loadstone.evaluation.measure import peak_bytes\n"
        "from loadstone.evaluation.scoring.divergence import Divergence\n"
        "torch.set_num_threads(1); diverge, peaks, found = Divergence(), [], []\n"
        "head = torch.randn(4, 262144)\n"
        "for _ in range(24):\n"
        "    hidden = torch.randn(8, 4)\n"
        "    found.append(diverge(hidden @ head, hidden @ head, torch.zeros(8, dtype=torch.long)))\n"
        "    peaks.append(peak_bytes(torch.device('cpu')) >> 20)\n"
        "print(peaks[1], peaks[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, late = map(int, done.stdout.split())
    assert late < early + 30


def test_masked_tokens() -> None:
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    diverge = Divergence()
    same = diverge(p, p.clone(), torch.tensor([0]))
    assert same["kl"].item() == 0 and same["kl_reverse"].item() == 0 and same["top1"].item() == 1
    q = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert diverge(p, q, torch.tensor([0]))["kl"].item() == float("inf")


def test_losses_are_those_of_each_model_alone(model: Any, tokenizer: Any) -> None:
    other = noisy(model)
    stream = tokenize(read_corpus(limit=2), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128, stride=64)
    values = run(model, other, stream, protocol)
    windows = make_windows(stream, protocol)
    maker = BatchMaker(stream, protocol, windows, torch.device("cpu"))
    for name, m in (("nll_reference", model), ("nll", other)):
        alone = score(m, maker, plan_batches(windows, 3), name="m")[0]["nll"]
        assert np.allclose(values[name], alone, atol=1e-5)


def test_a_model_does_not_diverge_from_itself(model: Any, tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=1), tokenizer)
    values = run(model, copy.deepcopy(model), stream, make_protocol(stream, dtype="f", longest=128))
    assert (values["kl"] == 0).all() and (values["kl_reverse"] == 0).all() and (values["top1"] == 1).all()


def test_record_and_worst_documents(model: Any, tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=25), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=128)
    values = run(model, noisy(model), stream, protocol)
    record = divergence_record(values, make_units(stream, protocol))
    quantiles = [record[k] for k in ("kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max")]
    assert quantiles == sorted(quantiles) and quantiles[-1] == values["kl"].max()
    assert record["kl"] == pytest.approx(values["kl"].mean()) and 0 < record["kl_stderr"] < record["kl"]
    worst = worst_documents(values, stream, tokenizer, 3)
    owner = stream.document[stream.scored]
    means = [values["kl"][owner == d].mean() for d in range(25)]
    assert [w["document"] for w in worst] == list(np.argsort(means)[::-1][:3])
    assert worst[0]["kl"] == pytest.approx(max(means))
    text = stream.corpus.documents[worst[0]["document"]]
    assert (worst[0]["before"] + worst[0]["worst_token"])[-20:].strip() in text


def test_different_vocabularies(model: Any, model_factory: Any, tokenizer: Any) -> None:
    stream = tokenize(read_corpus(limit=1), tokenizer)
    with pytest.raises(UsageError, match="vocabularies of 400 and 512"):
        run(model, model_factory(vocab_size=512), stream, make_protocol(stream, dtype="f", longest=128))


def test_a_broken_model_is_named(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    stream = tokenize(read_corpus(limit=1), tokenizer)
    protocol = make_protocol(stream, dtype="f", longest=128)
    with pytest.raises(ArtifactError, match="'b' gives losses"):
        run(model, broken, stream, protocol)
    with pytest.raises(ArtifactError, match="'a' gives losses"):
        run(broken, model, stream, protocol)
