"""Read tokens that many requests begin with once: an optimisation, so whatever it cannot do is done the plain way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from loadstone.errors import ArtifactError
from loadstone.evaluation.scoring.head import PrefixedModel, SplitModel, logits_of, split_head

log = logging.getLogger(__name__)
_TOKENS = 8
# The most that logits after a common beginning may differ from those of one pass, relative to the largest.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class Beginnings:
    """Reads common beginnings for one model. ``works``: False once one could not be read, or gave other logits than a
    single pass over all tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.works = True
        self._split: SplitModel | None = None
        self._compared = 0

    def after(self, cache: Any) -> PrefixedModel:
        """The model after a beginning."""
        if self._split is None:
            self._split = split_head(self.model)
        return PrefixedModel(self.model, cache, self._split)

    def read(self, tokens: Sequence[int], rest: Sequence[int]) -> Any:
        """The cache after ``tokens``, a `PrefixCache`; None where requests must be read whole. ``rest``: what follows
        in the longest request."""
        from loadstone.context.prefix.fit import make_prefix

        if not self.works:
            return None
        try:
            cache = make_prefix(self.model, torch.tensor([list(tokens)]), generates=False)
            # The first few tokens of one request show whether a continuation is right; a later one may be longer.
            if (count := min(len(rest), _TOKENS)) > self._compared:
                self._compare(cache, rest[:count])
                self._compared = count
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # of many kinds: caches of other shapes, arguments that a forward does not know
            log.info("common beginnings are read whole: %s", " ".join(str(error).split())[:200])
            self.works = False
            return None
        return cache

    @torch.no_grad()
    def _compare(self, cache: Any, rest: Sequence[int]) -> None:
        """Raise ArtifactError where tokens after ``cache`` do not get the logits of one pass over everything."""
        more = torch.tensor([list(rest)], device=cache.tokens.device)
        expected = logits_of(self.model, torch.cat([cache.tokens, more], 1))[0, -more.shape[1] - 1 :].double()
        split = self.after(cache).split_model
        hidden = split.backbone(torch.cat([cache.tokens[:, -1:], more], 1))
        got = split.head(hidden).to(expected)
        apart = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
        # `<=` and not `>`: a NaN fails too.
        if not apart <= _TOLERANCE.get(cache.prefix.dtype, 0.05):
            raise ArtifactError(f"its continuation differs from one pass by {apart:.1g} of the largest logit")
