"""lm-eval's Hugging Face adapter that computes common prefixes of requests once, or puts all after a fixed prefix."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from loadstone.errors import UsageError
from loadstone.evaluation.causal import Vocabulary
from loadstone.evaluation.scoring.beginnings import Beginnings
from loadstone.evaluation.scoring.common import SHORTEST, common_prefixes, overhead
from loadstone.evaluation.scoring.head import PrefixedModel

log = logging.getLogger(__name__)
Request = tuple[Any, list[int], list[int]]


class SharingLM(HFLM):  # type: ignore[misc]
    """A model after a prefix (`PrefixedModel`) answers every request after it; for others, common prefixes are found.

    Requests are shortened to their last shared token and what follows it, so that lm-eval handles them as usual;
    the model is then called after the prefix.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        share: bool = True,
        vocabulary: Vocabulary | None = None,
        separator_id: int | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._separator_id = separator_id
        self._fixed = model.cache if isinstance(model, PrefixedModel) else None
        self._current: Any = self._fixed
        self._last: tuple[list[int], Any] | None = None
        self._sharing = share
        plain = model.model if isinstance(model, PrefixedModel) else model
        options: dict[str, Any] = {}
        if self._fixed is not None:
            # The prefix already begins with BOS: no second one in the middle.
            options["add_bos_token"] = False
        super().__init__(pretrained=plain, tokenizer=tokenizer, batch_size=batch_size, **options)
        self._beginnings = Beginnings(self.model)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: after a prefix, the prefix's last token, and the separator of
        documents where the tokenizer has neither BOS nor EOS."""
        if self._fixed is not None:
            return int(self._fixed.tokens[0, -1])
        found = super().prefix_token_id
        found = self._separator_id if found is None else found
        if found is None:
            raise UsageError("the tokenizer has no BOS or EOS token, which tasks begin with")
        return int(found)

    @property
    def max_length(self) -> int:
        taken = 0 if self._fixed is None else self._fixed.prefix.length - 1
        return int(super().max_length) - taken

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[Any]:
        self._require(token for _, *parts in requests for part in parts for token in part)
        if self._fixed is not None:
            return list(super()._loglikelihood_tokens([self._after(r) for r in requests], *args, **kwargs))
        fits = [i for i, (_, c, t) in enumerate(requests) if len(c) + len(t) <= self.max_length + 1]
        groups = []
        if self._sharing and self.backend == "causal":
            # One extra token, because the last shared one stays in the request.
            rows = [[*requests[i][1], -1] for i in fits]
            groups = common_prefixes(rows, overhead(self.device))
        results: list[Any] = [None] * len(requests)
        left = set(range(len(requests)))
        for group in groups:
            members = [fits[m] for m in group.members]
            start = requests[members[0]][1][: group.length]
            longest = max((requests[m] for m in members), key=lambda r: len(r[1]) + len(r[2]))
            self._current = self._beginnings.read(start, [*longest[1], *longest[2]][len(start) : -1])
            if self._current is None:
                break
            log.info("computing the common prefix of %d requests, %d tokens, once", len(members), len(start))
            short = [(requests[m][0], requests[m][1][len(start) - 1 :], requests[m][2]) for m in members]
            try:
                found = super()._loglikelihood_tokens(short, *args, **kwargs)
            finally:
                self._current = None
            for m, result in zip(members, found, strict=True):
                results[m] = result
            left -= set(members)
        rest = sorted(left)
        found = super()._loglikelihood_tokens([requests[i] for i in rest], *args, **kwargs) if rest else []
        for i, result in zip(rest, found, strict=True):
            results[i] = result
        return results

    def _require(self, tokens: Iterable[int]) -> None:
        """Raise ArtifactError for a token that the model does not have."""
        if self._vocabulary is not None:
            highest = max(tokens, default=0)
            self._vocabulary.require(highest, self.tokenizer, type(self.model).__name__)

    def _after(self, request: Request) -> Request:
        """The request with the prefix's last token before its context, which is cut on the left if it is too long."""
        key, context, continuation = request
        last = self.prefix_token_id
        if not _is_bare(key, context, last):
            room = self.max_length - len(continuation)
            context = [last, *context[-room:]] if room > 0 else [last]
        return key, context, continuation

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._current is None:
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[no-any-return]
        split = self._beginnings.after(self._current).split_model
        with torch.no_grad():
            hidden = split.backbone(inps)
            return split.head(hidden.flatten(0, 1)[None] if not split.whole else hidden[None]).view(
                *inps.shape, -1
            )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation: Any
    ) -> torch.Tensor:
        self._require(context.unique().tolist())
        mask = generation.pop("attention_mask", torch.ones_like(context))
        if self._fixed is not None and not self._fixed.takes_padding and not mask.all():
            return self._one_by_one(context, max_length, stop, mask, generation)
        if self._fixed is not None:
            cache, length = self._fixed, self._fixed.prefix.length
            start = cache.tokens.expand(len(context), -1)
            generation["past_key_values"] = cache.fork(batch=len(context))
            found = super()._model_generate(
                torch.cat([start, context], 1),
                max_length + length,
                stop,
                attention_mask=torch.cat([torch.ones_like(start), mask], 1),
                **generation,
            )
            return found[:, length:]  # type: ignore[no-any-return]
        shared = self._shared_start(context, mask) if self._sharing else None
        if shared is not None:
            # The same row, with its padding between the shared tokens and its own.
            length = shared.prefix.length
            rows = torch.zeros_like(mask)
            ids = context.clone()
            for number, own in enumerate(_unpadded(context, mask)):
                begin = context.shape[1] - (len(own) - length)
                rows[number, :length] = 1
                rows[number, begin:] = 1
                ids[number, :length] = own[:length]
                ids[number, length:begin] = self.tokenizer.pad_token_id or 0
                ids[number, begin:] = own[length:]
            context, mask = ids, rows
            generation["past_key_values"] = shared.fork(batch=len(context))
        return super()._model_generate(context, max_length, stop, attention_mask=mask, **generation)  # type: ignore[no-any-return]

    def _one_by_one(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        mask: torch.Tensor,
        generation: dict[str, Any],
    ) -> torch.Tensor:
        """Generate row by row without padding, and return the answers as one padded batch."""
        width = context.shape[1]
        answers = []
        for own in _unpadded(context, mask):
            limit = max_length - (width - len(own))
            answers.append(self._model_generate(own[None], limit, stop, **generation)[0, len(own) :])
        longest = max(map(len, answers))
        pad = self.tokenizer.pad_token_id or 0
        padded = [torch.nn.functional.pad(a, (0, longest - len(a)), value=pad) for a in answers]
        return torch.cat([context, torch.stack(padded)], 1)

    def _shared_start(self, context: torch.Tensor, mask: torch.Tensor) -> Any:
        """The cache of the common prefix of all rows of a batch; None if it is too short to pay off."""
        rows = [row.tolist() for row in _unpadded(context, mask)]
        shortest = min(map(len, rows)) - 1
        length = 0
        while length < shortest and all(row[length] == rows[0][length] for row in rows):
            length += 1
        if length < SHORTEST or (len(rows) - 1) * length < overhead(self.device):
            return None
        # Only for exactly this prefix: results must not depend on the batches that this process had before.
        if self._last is None or self._last[0] != rows[0][:length]:
            longest = max(rows, key=len)
            self._last = rows[0][:length], self._beginnings.read(longest[:length], longest[length:])
        cache = self._last[1]
        if cache is None:
            return None
        return cache if cache.takes_padding or len({*map(len, rows)}) == 1 else None


def _is_bare(key: Any, context: list[int], last: int) -> bool:
    """Whether lm-eval added the prefix token itself: for an empty context, or a rolling document's first window."""
    return context == [last] and (key is None or key[0] is None or key[0] == "")


def _unpadded(context: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[seen.bool()] for row, seen in zip(context, mask, strict=True)]
