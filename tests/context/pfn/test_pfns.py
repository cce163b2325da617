from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pfns")
from pfns.model.bar_distribution import FullSupportBarDistribution
from pfns.model.encoders import (
    InputNormalizationEncoderStep,
    LinearInputEncoderStep,
    NanHandlingEncoderStep,
    SequentialEncoder,
)
from pfns.model.transformer import TableTransformer

from loadstone.context.pfn.pfns import fit_pfns
from loadstone.errors import UsageError

Rows = Callable[..., tuple[Tensor, Tensor]]


def table_transformer(**options: object) -> nn.Module:
    torch.manual_seed(0)
    nan = NanHandlingEncoderStep()
    keys = ("main", "nan_indicators")
    model = TableTransformer(
        encoder=SequentialEncoder(
            InputNormalizationEncoderStep(
                normalize_on_train_only=True, normalize_x=True,
                remove_outliers=False, remove_outliers_sigma=4.0,
            ),
            LinearInputEncoderStep(num_features=1, emsize=32, in_keys=("main",), out_keys=("output",)),
        ),
        y_encoder=SequentialEncoder(
            nan, LinearInputEncoderStep(num_features=2, emsize=32, in_keys=keys, out_keys=("output",))
        ),
        ninp=32, nhead=2, nhid=64, nlayers=2, decoder_dict={"standard": (None, 10)}, zero_init=False,
        feature_positional_embedding="normal_rand_vec", seed=3, **options,
    )  # fmt: skip
    model.criterion = FullSupportBarDistribution(torch.linspace(-3, 3, 11))
    return model.eval()


@pytest.mark.parametrize("multiquery", [False, True])
def test_cached_and_folded_is_plain(rows: Rows, multiquery: bool) -> None:
    model = table_transformer(multiquery_item_attention_for_test_set=multiquery)
    x, y = rows(12, 4)
    queries = torch.rand(6, 3, 4)
    one, other = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    context = fit_pfns(model, x, y)
    cached = context.logits(one)
    plain = model(x=x.expand(6, -1, -1).clone(), y=y.expand(6, -1).clone(), test_x=other * 1)
    torch.testing.assert_close(cached, plain, rtol=0, atol=1e-5)
    cached.square().sum().backward()
    plain.square().sum().backward()
    scale = other.grad.abs().max()
    assert scale > 0
    torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=1e-5)
    # The model is as it was, and shares its parameters with the context.
    assert list(model.state_dict()) == list(before) and not model.cache_trainset_representation
    assert {p.data_ptr() for p in context._copy.parameters()} == {p.data_ptr() for p in model.parameters()}
    first, second = fit_pfns(model, x[:5], y[:5]), context.logits(queries)
    assert torch.equal(context.logits(queries), second) and not torch.equal(first.logits(queries), second)


def test_posterior_is_the_packages(rows: Rows) -> None:
    model = table_transformer()
    context = fit_pfns(model, *rows(12, 4))
    queries = torch.rand(5, 4)
    posterior, criterion = context.posterior(queries), model.criterion
    logits = context.logits(queries)
    torch.testing.assert_close(posterior.mean.float(), criterion.mean(logits), rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.log_prob(torch.ones(5)).float(), -criterion(logits, torch.ones(5)))
    assert not torch.isnan(posterior.quantile(0.9)).any()


def test_wrong_use(rows: Rows) -> None:
    with pytest.raises(UsageError, match="batch-first"):
        fit_pfns(nn.Linear(2, 2), *rows(4, 2))
    with pytest.raises(UsageError, match="features"):
        fit_pfns(table_transformer(), *rows(4, 2)).logits(torch.zeros(3, 5))
