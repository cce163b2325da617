"""Multi-start optimisation of an acquisition function: all restarts in one batch, each with its own L-BFGS state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loadstone.context.pfn.captured import CapturedGradient
from loadstone.errors import UsageError

Acquisition = Callable[[Tensor], Tensor]
METHODS = ("lbfgs", "adam")

# Pairs of differences that L-BFGS keeps, and the decrease it asks of a step (Nocedal & Wright, 7.2 and 3.1).
_MEMORY = 8
_ARMIJO = 1e-4
_HALVINGS = 12


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best candidate ``x`` (d,) and its ``value``; ``candidates`` (restarts, d) and ``values`` (restarts,) are all
    end points, ``evaluations`` the rows that the acquisition function was asked for."""

    x: Tensor
    value: float
    candidates: Tensor
    values: Tensor
    evaluations: int


def optimize_acquisition(
    acquisition: Acquisition,
    bounds: Tensor,
    *,
    restarts: int = 32,
    raw_samples: int = 512,
    steps: int = 60,
    method: str = "lbfgs",
    seed: int = 0,
) -> Optimum:
    """Maximise ``acquisition``, which maps candidates (m, d) to values (m,), over the box ``bounds`` (2, d).

    Starts are the best ``restarts`` of ``raw_samples`` scrambled Sobol points. ``lbfgs`` projects onto the box and
    leaves converged restarts out of later batches; ``adam`` takes all steps with all restarts. Deterministic for a
    seed. Raises `UsageError` for bounds that are not a box, or an unknown method.
    """
    if bounds.ndim != 2 or len(bounds) != 2 or not (bounds[0] < bounds[1]).all():
        raise UsageError("bounds must be (2, d), lower below upper", "Give torch.stack([lower, upper])")
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", f"One of {', '.join(METHODS)}")
    counter = _Counted(acquisition, bounds, restarts)
    sobol = torch.quasirandom.SobolEngine(bounds.shape[1], scramble=True, seed=seed)
    raw = sobol.draw(max(raw_samples, restarts)).to(bounds)
    with torch.no_grad():
        values = counter.value(raw)
    start = raw[values.argsort(descending=True, stable=True)[:restarts]]
    end = (_lbfgs if method == "lbfgs" else _adam)(counter, start, steps)
    with torch.no_grad():
        values = counter.value(end)
    candidates = counter.place(end)
    best = int(values.argmax())
    return Optimum(candidates[best], values[best].item(), candidates, values, counter.rows)


class _Counted:
    """The acquisition on the unit cube, with gradients, counting the rows it is asked for.

    On a GPU every gradient is computed for ``restarts`` rows, which takes no longer than for a few and needs one graph.
    """

    def __init__(self, acquisition: Acquisition, bounds: Tensor, restarts: int) -> None:
        self.acquisition, self.bounds, self.restarts, self.rows = acquisition, bounds, restarts, 0
        self._negated = CapturedGradient(lambda unit: -self._finite(unit))

    def place(self, unit: Tensor) -> Tensor:
        low, high = self.bounds
        return low + unit * (high - low)

    def _finite(self, unit: Tensor) -> Tensor:
        value = self.acquisition(self.place(unit))
        return torch.where(value.isfinite(), value, -torch.inf)

    def value(self, unit: Tensor) -> Tensor:
        self.rows += len(unit)
        return self._finite(unit)

    def loss_and_gradient(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the value (m,) and its gradient (m, d); a value that is not finite counts as the worst there is."""
        asked = len(unit)
        self.rows += asked
        if unit.is_cuda and asked < self.restarts:
            unit = torch.cat((unit, unit[-1:].expand(self.restarts - asked, -1)))
        loss, gradient = self._negated(unit)
        return loss[:asked].to(unit.dtype), gradient[:asked].nan_to_num(0.0, 0.0, 0.0)


def _lbfgs(counter: _Counted, start: Tensor, steps: int) -> Tensor:
    """Projected L-BFGS with backtracking for each row on its own; rows that converge are evaluated no more."""
    result = start.clone()
    alive = torch.arange(len(start), device=start.device)
    u = start
    loss, gradient = counter.loss_and_gradient(u)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        free = ~(((u <= 0) & (gradient > 0)) | ((u >= 1) & (gradient < 0)))
        reduced = gradient * free
        direction = -_two_loops(reduced, history) * free
        uphill = (direction * reduced).sum(-1, keepdim=True) >= 0
        direction = torch.where(uphill, -reduced, direction)
        # Before there is curvature to go by, a step moves a tenth of the box at most.
        longest = direction.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        limit = 0.1 if not history else 0.5
        direction = direction * (limit / longest).clamp(max=1.0)
        new, new_loss, new_gradient, moved = _backtrack(counter, u, loss, gradient, direction)
        history = [*history, (new - u, new_gradient - gradient)][-_MEMORY:]
        gained = loss - new_loss
        going = moved & (gained > 1e-9 * (1 + loss.abs()))
        result[alive] = new
        if not going.any():
            break
        alive, u, loss, gradient = alive[going], new[going], new_loss[going], new_gradient[going]
        history = [(s[going], y[going]) for s, y in history]
    return result


def _two_loops(gradient: Tensor, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian's product with each row of ``gradient``; pairs without curvature are passed over."""
    q = gradient.clone()
    kept = []
    for s, y in reversed(history):
        curvature = (s * y).sum(-1, keepdim=True)
        good = curvature > 1e-12
        rho = torch.where(good, 1 / torch.where(good, curvature, 1.0), 0.0)
        alpha = rho * (s * q).sum(-1, keepdim=True)
        q = q - alpha * y
        kept.append((s, y, rho, alpha))
    if history:
        s, y = history[-1]
        curvature, length = (s * y).sum(-1, keepdim=True), (y * y).sum(-1, keepdim=True)
        good = (curvature > 1e-12) & (length > 0)
        q = q * torch.where(good, curvature / torch.where(good, length, 1.0), 1.0)
    for s, y, rho, alpha in reversed(kept):
        q = q + s * (alpha - rho * (y * q).sum(-1, keepdim=True))
    return q


def _backtrack(
    counter: _Counted, u: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve each row's step until it decreases enough: (new rows, losses, gradients, whether a row moved)."""
    new, new_loss, new_gradient = u.clone(), loss.clone(), gradient.clone()
    pending = torch.arange(len(u), device=u.device)
    step = 1.0
    for _ in range(_HALVINGS):
        trial = (u[pending] + step * direction[pending]).clamp(0, 1)
        trial_loss, trial_gradient = counter.loss_and_gradient(trial)
        slope = (gradient[pending] * (trial - u[pending])).sum(-1)
        accepted = trial_loss <= loss[pending] + _ARMIJO * slope
        done = pending[accepted]
        new[done], new_loss[done] = trial[accepted], trial_loss[accepted]
        new_gradient[done] = trial_gradient[accepted]
        pending = pending[~accepted]
        if not len(pending):
            break
        step /= 2
    moved = torch.ones(len(u), dtype=torch.bool, device=u.device)
    moved[pending] = False
    return new, new_loss, new_gradient, moved


def _adam(counter: _Counted, start: Tensor, steps: int) -> Tensor:
    """Adam on the unit cube, projected after each step, with a learning rate that falls to nothing."""
    u = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], lr=0.05)
    for number in range(steps):
        _, u.grad = counter.loss_and_gradient(u)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - number / steps)
        optimizer.step()
        with torch.no_grad():
            u.clamp_(0, 1)
    return u.detach()
