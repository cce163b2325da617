"""An in-context model as a BoTorch model (extra ``[botorch]``): its posterior reads a cached context.

    model = ContextModel(loadstone.load("builtin:tiny-pfn"), train_X, train_Y)
    acquisition = BarAcquisition(model, lambda posterior: log_ei(posterior, train_Y.max()))
    candidate, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=16, raw_samples=256)

Restarts and candidates are folded into one sequence, whatever the shape BoTorch asks with, so a batch that shrinks as
restarts converge costs only what is left of it. Written for BoTorch 0.18; ``botorch_community``'s discretized
acquisition functions take the posterior as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.utils.transforms import t_batch_mode_transform
from botorch_community.posteriors.riemann import BoundedRiemannPosterior
from torch import Tensor

from loadstone.context.pfn.bars import BarPosterior
from loadstone.context.pfn.captured import CapturedGradient, CapturedValue
from loadstone.context.pfn.model import PFN
from loadstone.context.pfn.training_context import TrainingContext
from loadstone.context.tables.predictions import REGRESSION


class ContextPosterior(BoundedRiemannPosterior):
    """BoTorch's view of a `BarPosterior`: moments and draws have a trailing dimension of one output.

    ``mean``, ``variance`` and draws are exact, with the half-normal tails; ``integrate`` takes the outer bars as
    bounded, as BoTorch's discretized acquisition functions expect.
    """

    def __init__(self, bars: BarPosterior) -> None:
        super().__init__(bars.borders, bars.mass)
        self.bars = bars

    @property
    def mean(self) -> Tensor:
        """(..., q, 1)."""
        return self.bars.mean.unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        """(..., q, 1)."""
        return self.bars.variance.unsqueeze(-1)

    def icdf(self, value: float | Tensor) -> Tensor:
        """Quantiles (samples, ..., q, 1) for probabilities (samples, ..., q) or one number."""
        if not torch.is_tensor(value):
            value = torch.full(
                (1, *self.probabilities.shape[:-1]), value, dtype=torch.float64, device=self.device
            )
        return self.bars.quantile(value).unsqueeze(-1)


class ContextModel(Model):
    """A PFN fitted on ``train_X`` (n, d) and ``train_Y`` (n, 1). The context is made once and kept.

    Posteriors are marginal: each of q candidates on its own. Pending points are joined to the training rows with the
    mean predicted for them (a PFN's context is a set, so that is a new prefill), once for each set of pending points.
    ``options`` are `fit_context`'s, such as ``cache_dtype``.
    """

    def __init__(self, base: PFN, train_X: Tensor, train_Y: Tensor, **options: Any) -> None:
        super().__init__()
        if train_X.ndim != 2 or train_Y.shape != (len(train_X), 1):
            raise UnsupportedError(
                f"train_X {tuple(train_X.shape)} and train_Y {tuple(train_Y.shape)}: (n, d), (n, 1)"
            )
        self.train_X, self.train_Y, self._options = train_X, train_Y, options
        self.base = base
        self._contexts: dict[tuple[Any, ...], TrainingContext] = {}

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size()

    def context(self, pending_X: Tensor | None = None, *, negate: bool = False) -> TrainingContext:
        """The context of the training rows and of pending points (m, d), if there are any."""
        key = (negate, None if pending_X is None else tuple(pending_X.detach().flatten().tolist()))
        if key not in self._contexts:
            x, y = self.train_X, self.train_Y[:, 0]
            y = -y if negate else y
            if pending_X is not None:
                pending = pending_X.detach().reshape(-1, x.shape[-1]).to(x)
                with torch.no_grad():
                    believed = self.context(negate=negate).posterior(pending).mean
                x, y = torch.cat((x, pending)), torch.cat((y, believed.to(y)))
            # One set of pending points at a time: an older one will not come back.
            kept = {k: c for k, c in self._contexts.items() if k[1] is None}
            self._contexts = kept | {key: self.base.fit(x, y, task=REGRESSION, **self._options)}
        return self._contexts[key]

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
        pending_X: Tensor | None = None,
        negate_train_ys: bool = False,
    ) -> ContextPosterior:
        """Posteriors at ``X`` (..., q, d), of observations (a PFN does not tell noise from function)."""
        if posterior_transform is not None or output_indices not in (None, [0]):
            raise UnsupportedError("ContextModel has one output and takes no posterior_transform")
        return ContextPosterior(self.context(pending_X, negate=negate_train_ys).posterior(X))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> ContextModel:
        """A model that has seen (m, d) and (m, 1) more: a new prefill."""
        x, y = torch.cat((self.train_X, X.to(self.train_X))), torch.cat((self.train_Y, Y.to(self.train_Y)))
        return ContextModel(self.base, x, y, **self._options)


class BarAcquisition(AcquisitionFunction):
    """Any function of a `BarPosterior` (see `loadstone.context.bayesopt.acquisition`) for ``optimize_acqf``.

    On a GPU ``value`` is captured with its gradient as a CUDA graph: it must not depend on numbers that change later.
    """

    def __init__(self, model: ContextModel, value: Callable[[BarPosterior], Tensor]) -> None:
        super().__init__(model=model)
        self.value = value
        self._captured: tuple[TrainingContext, CapturedGradient] | None = None
        self.set_X_pending(None)

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """(batch, 1, d) -> (batch,), pending points accounted for."""
        context = self.model.context(self.X_pending)
        if not (X.is_cuda and X.requires_grad):
            return self.value(context.posterior(X)).squeeze(-1)
        if self._captured is None or self._captured[0] is not context:
            self._captured = context, CapturedGradient(lambda rows: self.value(context.posterior(rows)))
        values: Tensor = CapturedValue.apply(X.flatten(0, -2), self._captured[1])
        return values.view(X.shape[:-2])
