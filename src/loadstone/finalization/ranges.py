"""Ranges of layer inputs, for formats that store them (NVFP4 with quantized inputs), measured on text.

As in `export_fakequant`, nothing is quantized meanwhile and the largest magnitude counts. One decoder layer is in
memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.encoders.compressed_tensors import PackedEncoding
from loadstone.finalization.layers import layer_calls, run_layer
from loadstone.finalization.plan import FinalizePlan, Step
from loadstone.finalization.statistics import largest_of_all
from loadstone.ranks import Ranks

if TYPE_CHECKING:
    import torch

_FILE = "inputs.json"
_REMEDY = "Leave them plain by a rule of a recipe file, or use nvfp4-weight-only"


def measured_parameters(plan: FinalizePlan) -> list[str]:
    """The parameters of the model whose inputs have to be measured for ``plan``."""
    return list(dict.fromkeys(step.parameter for step in plan.steps if _measures(step)))


def measure_inputs(
    plan: FinalizePlan,
    rows: torch.Tensor,
    folder: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ranks: Ranks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure the inputs on ``rows``, token ids (rows, length), divided among ``ranks``, and write the ranges to
    ``folder``, where those of a killed run are taken over. ``on_progress(done, total)`` counts layers.

    Raises `UsageError` for weights outside of the decoder layers, `ArtifactError` for a model whose layers cannot be
    run one by one, and for a layer that no text reached or whose inputs are not finite.
    """
    import torch

    from loadstone.loading import plan as load_plan
    from loadstone.loading.layer_inputs import InputRanges, change_inputs
    from loadstone.loading.streamed import streamed

    ranks, names = ranks or Ranks(), measured_parameters(plan)
    if not names or ranks.from_first(ranks.rank == 0 and (folder / _FILE).is_file()):
        return
    ranges = InputRanges()
    source = load_plan(plan.source, dtype="float32", trust_remote_code=trust_remote_code)
    with streamed(source, torch.device(device)) as model, torch.no_grad():
        prefix = model.stack_name
        outside = next((name for name in names if not name.startswith(f"{prefix}.")), None)
        if outside is not None:
            raise UsageError(
                f"'{outside}' is not in a decoder layer ({prefix}): its inputs cannot be measured", _REMEDY
            )
        hidden, calls = layer_calls(model.model.base_model, model.stack, rows, device, ranks, _REMEDY)
        for number in range(len(model)):
            start, layer = f"{prefix}.{number}.", model.layer(number)
            changes = {n.removeprefix(start): partial(ranges.record, n) for n in names if n.startswith(start)}
            try:
                change_inputs(layer, changes)
            except ArtifactError as error:
                raise ArtifactError(f"{start}: {error.message}", _REMEDY) from None
            hidden = [run_layer(layer, x, calls[number], device) for x in hidden]
            if on_progress:
                on_progress(number + 1, len(model))
    ranges.largest = largest_of_all(ranks, ranges.largest)
    ranges.require(names)
    found = {name: float(ranges.largest[name]) for name in names}
    for name, largest in found.items():
        if largest == float("inf"):
            raise ArtifactError(
                f"the inputs of '{name}' are NaN or infinite", "Use another checkpoint or text"
            )
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partly = folder / f"{_FILE}.tmp"
        partly.write_text(json.dumps(found))
        partly.replace(folder / _FILE)


def with_ranges(plan: FinalizePlan, folder: Path, ranks: Ranks) -> FinalizePlan:
    """The plan with the ranges that `measure_inputs` wrote to ``folder``, on any rank."""
    if not measured_parameters(plan):
        return plan
    found = ranks.from_first(json.loads((folder / _FILE).read_text()) if ranks.rank == 0 else None)

    def ranged(step: Step) -> Step:
        if not _measures(step) or not isinstance(step.encoding, PackedEncoding):
            return step
        return replace(step, encoding=replace(step.encoding, largest_input=found[step.parameter]))

    return replace(plan, shards=tuple(tuple(map(ranged, shard)) for shard in plan.shards))


def _measures(step: Step) -> bool:
    return isinstance(step.encoding, PackedEncoding) and step.encoding.layer.measures_inputs
