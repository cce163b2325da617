"""What the shipped PFN was trained on: random functions and random causal models, sampled in whole batches.

Regression tables come from mixtures of Gaussian processes (automatic relevance determination, several length scales,
input and output warping, noise) and from the causal prior; classification tables from the causal prior alone. All
draws of one call share rows, features and classes and differ in everything else; everything stays on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Cosines in the random-feature approximation of a Gaussian process (Rahimi & Recht, NeurIPS 2007).
_FREQUENCIES = 256


@dataclass(frozen=True)
class Batch:
    """Tables of one shape: ``x`` (tables, rows, d), ``y`` (tables, rows), float or class numbers below ``classes``."""

    x: Tensor
    y: Tensor
    classes: int = 0


def regression(tables: int, rows: int, features: int, device: torch.device | str) -> Batch:
    """Tables with a numeric target, six in ten from Gaussian processes, the others causal."""
    smooth = max(1, round(0.6 * tables))
    parts = [gaussian_processes(smooth, rows, features, device)]
    if tables > smooth:
        parts.append(causal(tables - smooth, rows, features, device))
    x = torch.cat([x for x, _ in parts])
    y = torch.cat([y for _, y in parts])
    return Batch(_with_gaps(x), y)


def classification(tables: int, rows: int, features: int, classes: int, device: torch.device | str) -> Batch:
    """Tables with ``classes`` classes, numbered at random."""
    x, score = causal(tables, rows, features, device)
    # Half the tables cut one score at random quantiles, half take the largest of one noisy score per class.
    share = torch.distributions.Dirichlet(torch.full((classes,), 3.0, device=device)).sample((tables,))
    rank = score.argsort(1).argsort(1).double() / rows
    cut = (rank.unsqueeze(-1) > share.cumsum(-1)[:, None, :-1].double()).sum(-1)
    weights = torch.randn(tables, features + 1, classes, device=device) * _bernoulli(
        0.6, tables, features + 1, 1, like=x
    )
    inputs = torch.cat((_standard(x), 2 * _standard(score.unsqueeze(-1))), -1)
    largest = (torch.tanh(inputs) @ weights + 0.1 * torch.randn(tables, rows, classes, device=device)).argmax(
        -1
    )
    y = torch.where(torch.rand(tables, 1, device=device) < 0.5, cut, largest)
    # A few wrong labels in some tables, so that certainty has to be earned.
    flips = torch.rand(tables, rows, device=device) < 0.15 * torch.rand(tables, 1, device=device).pow(3)
    y = torch.where(flips, torch.randint(classes, y.shape, device=device), y)
    numbering = torch.rand(tables, classes, device=device).argsort(-1)
    return Batch(_with_gaps(x), numbering.gather(1, y), classes)


def gaussian_processes(
    tables: int, rows: int, features: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """``x`` (tables, rows, features) and a noisy, possibly warped function of it (tables, rows)."""
    x = _inputs(tables, rows, features, device)
    # Kumaraswamy warping of the unit cube, in a third of the tables.
    shape = torch.exp(0.5 * torch.randn(2, tables, 1, features, device=device))
    unit = x.clamp(1e-4, 1 - 1e-4)
    bent = 1 - (1 - unit ** shape[0]) ** shape[1]
    inner = torch.where(_bernoulli(0.33, tables, 1, 1, like=x) > 0, bent, x)
    y = torch.zeros(tables, rows, device=device)
    for amplitude in (1.0, 0.4):
        y = y + amplitude * torch.rand(tables, 1, device=device) ** (1 - amplitude) * _random_features(inner)
    trend = torch.randn(tables, features, 1, device=device) / math.sqrt(features)
    y = y + _bernoulli(0.3, tables, 1, like=x) * (inner @ trend).squeeze(-1) * 2
    y = _standard(y.unsqueeze(-1)).squeeze(-1)
    # Output warping: none in half the tables, else skewed or saturated.
    kind = torch.rand(tables, 1, device=device)
    y = torch.where(kind > 0.75, torch.exp(0.7 * y), torch.where(kind > 0.5, torch.tanh(1.2 * y), y))
    y = _standard(y.unsqueeze(-1)).squeeze(-1)
    noise = torch.exp(torch.empty(tables, 1, device=device).uniform_(math.log(1e-3), math.log(0.6)))
    noise = noise * _bernoulli(0.85, tables, 1, like=x)
    return x, y + noise * torch.randn(tables, rows, device=device)


def causal(tables: int, rows: int, features: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``x`` and ``y`` read off the nodes of random causal graphs, some of them off sums of random trees.

    Layers of nodes are sparse random functions of the layer before, with noise; features are any nodes, the target is
    one of the last layer, so a feature may be its cause, its effect or a sibling.
    """
    width = max(8, min(64, features + 6))
    node = _standard(_causes(tables, rows, width, device))
    layers = [node]
    for _ in range(int(torch.randint(2, 5, ()).item())):
        kept = _bernoulli(float(torch.empty(()).uniform_(0.15, 0.7)), tables, width, width, like=node)
        weights = torch.randn(tables, width, width, device=device) * kept
        bias = torch.randn(tables, 1, width, device=device)
        node = _standard(_activate(_standard(node @ weights) * 1.5 + bias))
        noise = torch.exp(
            torch.empty(tables, 1, width, device=device).uniform_(math.log(0.01), math.log(0.5))
        )
        node = node + noise * torch.randn_like(node)
        layers.append(node)
    nodes = torch.cat(layers, -1)
    order = torch.rand(tables, nodes.shape[-1] - 1, device=device).argsort(-1)[:, :features]
    x = nodes.gather(-1, order.unsqueeze(1).expand(-1, rows, -1))
    x = _coarsened(x)
    y = torch.where(_bernoulli(0.35, tables, 1, like=x) > 0, _trees(x), nodes[..., -1])
    return x, _standard(y.unsqueeze(-1)).squeeze(-1)


def _inputs(tables: int, rows: int, features: int, device: torch.device | str) -> Tensor:
    """Uniform in the unit cube, or normal, or clustered around a few centres."""
    uniform = torch.rand(tables, rows, features, device=device)
    normal = 0.5 + 0.2 * torch.randn(tables, rows, features, device=device)
    centre = torch.rand(tables, 5, features, device=device)
    which = torch.randint(5, (tables, rows, 1), device=device).expand(-1, -1, features)
    clustered = centre.gather(1, which) + 0.05 * torch.randn(tables, rows, features, device=device)
    kind = torch.rand(tables, 1, 1, device=device)
    return torch.where(kind < 0.6, uniform, torch.where(kind < 0.85, normal, clustered))


def _random_features(x: Tensor) -> Tensor:
    """One draw of a stationary process for each table (tables, rows): Gaussian or Matérn spectra, relevance by
    feature."""
    tables, _, features = x.shape
    device = x.device
    frequency = torch.randn(tables, features, _FREQUENCIES, device=device)
    # A normal over the root of a chi-square is Student's t: the spectrum of a Matérn kernel.
    freedom = torch.tensor([3.0, 5.0], device=device)[torch.randint(2, (tables, 1), device=device)]
    chi = torch.distributions.Chi2(freedom.expand(-1, _FREQUENCIES)).sample() / freedom
    heavy = (torch.rand(tables, 1, device=device) < 0.5) & (freedom > 0)
    frequency = frequency / torch.where(heavy, chi.clamp(min=1e-2).sqrt(), 1.0).unsqueeze(1)
    typical = torch.exp(torch.empty(tables, 1, device=device).uniform_(math.log(0.12), math.log(1.5)))
    length = typical * torch.exp(0.5 * torch.randn(tables, features, device=device))
    relevant = _bernoulli(0.8, tables, features, like=x)
    relevant[:, 0] = 1.0
    # Distances grow with the number of relevant features: so do the length scales.
    length = length * relevant.sum(-1, keepdim=True).sqrt()
    frequency = frequency * (relevant / length).unsqueeze(-1)
    phase = 2 * math.pi * torch.rand(tables, 1, _FREQUENCIES, device=device)
    weights = torch.randn(tables, _FREQUENCIES, 1, device=device) * math.sqrt(2 / _FREQUENCIES)
    return (torch.cos(x @ frequency + phase) @ weights).squeeze(-1)


def _causes(tables: int, rows: int, width: int, device: torch.device | str) -> Tensor:
    kind = torch.rand(tables, 1, width, device=device)
    normal = torch.randn(tables, rows, width, device=device)
    centre = 2 * torch.randn(tables, 4, width, device=device)
    which = torch.randint(4, (tables, rows, 1), device=device).expand(-1, -1, width)
    clustered = centre.gather(1, which) + 0.4 * normal
    uniform = torch.rand(tables, rows, width, device=device)
    return torch.where(kind < 0.5, normal, torch.where(kind < 0.8, clustered, uniform))


def _activate(h: Tensor) -> Tensor:
    """A random nonlinearity for each node of each table."""
    kind = torch.randint(7, (h.shape[0], 1, h.shape[2]), device=h.device)
    options = (
        h,
        torch.tanh(h),
        torch.relu(h),
        torch.sin(2 * h),
        h.abs(),
        h.square().clamp(max=9),
        (h > 0).to(h.dtype),
    )
    result = options[0]
    for number, value in enumerate(options[1:], 1):
        result = torch.where(kind == number, value, result)
    return result


def _trees(x: Tensor) -> Tensor:
    """The sum of four oblivious trees of depth 3 on each table's features (tables, rows)."""
    tables, rows, features = x.shape
    total = torch.zeros(tables, rows, device=x.device)
    for _ in range(4):
        leaf = torch.zeros(tables, rows, dtype=torch.long, device=x.device)
        for _ in range(3):
            column = torch.randint(features, (tables, 1, 1), device=x.device).expand(-1, rows, 1)
            pivot = torch.randint(rows, (tables, 1), device=x.device)
            values = x.gather(-1, column).squeeze(-1)
            leaf = 2 * leaf + (values > values.gather(1, pivot)).long()
        total = total + torch.randn(tables, 8, device=x.device).gather(1, leaf)
    return total


def _coarsened(x: Tensor) -> Tensor:
    """Round some features to a few levels, and skew some others, as counts, codes and amounts are."""
    step = 0.3 + 1.2 * torch.rand(x.shape[0], 1, x.shape[2], device=x.device)
    kind = torch.rand(x.shape[0], 1, x.shape[2], device=x.device)
    return torch.where(
        kind < 0.2, (x / step).round() * step, torch.where(kind < 0.3, torch.exp(x.clamp(max=4)), x)
    )


def _with_gaps(x: Tensor) -> Tensor:
    """Take out values at random in a tenth of the tables."""
    rate = 0.2 * torch.rand(x.shape[0], 1, 1, device=x.device) * _bernoulli(0.1, x.shape[0], 1, 1, like=x)
    return x.masked_fill(torch.rand_like(x) < rate, torch.nan)


def _standard(h: Tensor) -> Tensor:
    """Zero mean and unit spread along the rows."""
    return (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True).clamp(min=1e-4)


def _bernoulli(p: float, *shape: int, like: Tensor) -> Tensor:
    return (torch.rand(*shape, device=like.device) < p).to(like.dtype)
