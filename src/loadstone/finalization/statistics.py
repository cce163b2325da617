"""What calibration learns of the inputs of Linears and experts, over the rows of all ranks.

Each rank sees its own rows, and sums of floating-point numbers depend on their order. So each feature is scaled by a
power of two that its largest magnitude allows, and what is added are integers whose sums stay below 2^53: exact in
float64, so that any number of ranks gives the same bits. The first rows tell magnitudes, with room for larger ones;
where that does not suffice, the sums are made again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, log2, prod
from typing import TYPE_CHECKING, Any

from loadstone.ranks import Ranks

if TYPE_CHECKING:
    import torch

# Rows of a second moment that are sent at once; fixed, since they decide which half of the matrix counts.
_ROWS = 512
# How many times as large as in the first rows a feature may be, and its share of the largest feature that is taken for
# one that they do not have.
_ROOM, _FLOOR = 32.0, 2.0**-10
# Bits of a sum of integers that float64 holds exactly, less one for float32 rounding upwards.
_BITS = 52


@dataclass(frozen=True)
class Inputs:
    """Statistics of a Linear's inputs: largest and summed magnitudes (in,), second moments (in, in), float32, and the
    number of tokens; without sums where only the largest magnitudes were asked for."""

    largest: torch.Tensor
    total: torch.Tensor | None = None
    moment: torch.Tensor | None = None
    count: int = 0

    @classmethod
    def of(cls, *parts: torch.Tensor) -> Inputs:
        """The statistics of inputs (…, in) in several parts."""
        seen = InputStatistics(sum(x.numel() // x.shape[-1] for x in parts))
        for x in parts:
            seen.see("", x)
        seen.begin_sums(seen.largest, exactly=True)
        for x in parts:
            seen.see("", x)
        return seen.add_up(Ranks(), {"": 0})[""]


class _Sums:
    """Sums over the inputs of one key, of magnitudes up to ``bound`` (in,), as integers in units that follow from it
    and ``tokens``, the most tokens that will be added."""

    def __init__(self, bound: torch.Tensor, tokens: int) -> None:
        import torch

        bits = (_BITS - ceil(log2(max(tokens, 2)))) // 2
        # |x| < 2^exponent; an input of zeros alone needs no scale.
        exponent = torch.frexp(bound).exponent.clamp(min=-100)
        self.scale = torch.ldexp(torch.ones_like(bound), bits - exponent)
        self.bound, size = bound, bound.numel()
        self.moment = torch.zeros(size, size, dtype=torch.float64, device=bound.device)
        # The last entry counts tokens.
        self.total = torch.zeros(size + 1, dtype=torch.float64, device=bound.device)

    def add(self, flat: torch.Tensor) -> None:
        scaled = flat * self.scale
        self.moment += (scaled.t() @ scaled).trunc_()
        self.total[:-1] += scaled.abs().sum(0).trunc_()
        self.total[-1] += len(flat)


class InputStatistics:
    """Statistics by key, of inputs that `see` is told, over all ranks.

    ``tokens``: the most tokens that a key sees on all ranks together. Call `see` for inputs of some rows, then
    `share_largest` and `begin_sums`; then for those of all rows, `share_largest`, and while not `fits` again from
    `begin_sums` on; then `add_up`.
    """

    def __init__(self, tokens: int) -> None:
        self.largest: dict[Any, torch.Tensor] = {}
        self._tokens = tokens
        self._sums: dict[Any, _Sums] = {}

    def see(self, key: Hashable, x: torch.Tensor) -> None:
        """Note inputs (…, in)."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        size = flat.abs().amax(0)
        self.largest[key] = size.maximum(self.largest[key]) if key in self.largest else size
        if key in self._sums:
            self._sums[key].add(flat)

    def share_largest(self, ranks: Ranks, device: str) -> None:
        """The largest magnitudes become those of all ranks' inputs, infinite for NaN."""
        self.largest = largest_of_all(ranks, self.largest, device)

    def begin_sums(self, keys: Iterable[Any], exactly: bool = False) -> None:
        """From now on add up the inputs of ``keys``, which are no larger than those so far, or (``exactly`` is false)
        not much."""
        # The earlier ones first, for their memory.
        self._sums = {}
        for key in keys:
            size = self.largest[key]
            bound = size if exactly else size.maximum(size.max() * _FLOOR) * _ROOM
            self._sums[key] = _Sums(bound, self._tokens)

    def fits(self, keys: Iterable[Any]) -> bool:
        """Whether the sums are those of all ``keys``, and no input was too large for them."""
        return all(
            key in self._sums and bool((self.largest[key] <= self._sums[key].bound).all()) for key in keys
        )

    def add_up(self, ranks: Ranks, owners: Mapping[Any, int]) -> dict[Any, Inputs]:
        """The statistics of all keys; second moments only of those that this rank owns."""
        import torch

        found = {key: Inputs(size) for key, size in self.largest.items()}
        sums, self._sums = self._sums, {}
        if sums:
            totals = ranks.combine(torch.cat([each.total for each in sums.values()]), "sum")
        sizes = [each.total.numel() for each in sums.values()]
        for key, total in zip(list(sums), totals.split(sizes) if sums else (), strict=True):
            each = sums.pop(key)
            moment = _moment_of_all(ranks, each.moment, owners[key])
            unit = 1 / each.scale
            if moment is not None:
                moment = moment.float().mul_(unit[:, None]).mul_(unit)
            mean_size = total[:-1].float() * unit
            found[key] = Inputs(found[key].largest, mean_size, moment, int(total[-1]))
        return found


def _moment_of_all(ranks: Ranks, moment: torch.Tensor, owner: int) -> torch.Tensor | None:
    """The sum of all ranks' second moments (in, in) on rank ``owner``, None on others. Half of it is sent."""
    starts = range(0, len(moment), _ROWS)
    upper = (moment[start : start + _ROWS, start:] for start in starts)
    for start, part in zip(starts, ranks.sums(upper, owner) if ranks.size > 1 else upper, strict=True):
        stop = start + _ROWS
        if ranks.rank == owner:
            moment[start:stop, start:] = part
            moment[stop:, start:stop] = moment[start:stop, stop:].t()
    return moment if ranks.rank == owner else None


def largest_of_all(
    ranks: Ranks, mine: Mapping[Any, torch.Tensor], device: str = "cpu"
) -> dict[Any, torch.Tensor]:
    """The largest of all ranks' values by key, float32 on ``device``, infinite for NaN; ranks may lack keys."""
    import torch

    shapes: dict[Any, tuple[int, ...]] = {}
    for each in ranks.gather({key: tuple(value.shape) for key, value in mine.items()}):
        shapes |= each
    if not shapes:
        return {}
    flat = [
        mine[key].flatten().float().to(device).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if key in mine
        else torch.zeros(prod(shape), device=device)
        for key, shape in shapes.items()
    ]
    largest = ranks.combine(torch.cat(flat), "max").split([prod(shape) for shape in shapes.values()])
    return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), largest, strict=True)}


def divide(costs: Mapping[Any, float], ranks: Ranks) -> dict[Any, int]:
    """A rank for each key, so that all have about the same to do: the dearest first, to whoever has least."""
    loads = [0.0] * ranks.size
    owners = {}
    for key in sorted(costs, key=lambda key: -costs[key]):
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += costs[key]
    return owners
