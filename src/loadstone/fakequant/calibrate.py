"""Ranges of layer inputs, keys and values, measured by running the model on text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.errors import UsageError
from loadstone.fakequant.formats.spec import CALIBRATED
from loadstone.fakequant.inputs import change_quantizer_inputs, keys_and_values
from loadstone.fakequant.offload import return_memory
from loadstone.fakequant.options import Options
from loadstone.fakequant.plan import ExportPlan
from loadstone.fakequant.state import QuantizerState, check_state, input_specs
from loadstone.finalization.statistics import largest_of_all
from loadstone.loading.language_model import on_token_ids
from loadstone.loading.layer_inputs import InputRanges
from loadstone.ranks import Ranks
from loadstone.text.tokenizing import require_known

if TYPE_CHECKING:
    import torch

_CONTEXT = 512


def calibrate_directory(
    artifact: Artifact, plan: ExportPlan, options: Options, ranks: Ranks
) -> QuantizerState:
    """The quantizers of an export with their ranges, the model loaded for it if one has to be measured: by every rank
    that has room for a copy, and these divide the text."""
    if not options.calibrates:
        return QuantizerState(input_specs(plan) if options.activations else {})
    model = _loaded(artifact, options, ranks)
    holders = [rank for rank, holds in enumerate(ranks.gather(model is not None)) if holds]
    batches = []
    if model is not None:
        every = token_batches(
            options.calibrate or (), artifact, model.config, trust_remote_code=options.trust_remote_code
        )
        batches = every[holders.index(ranks.rank) :: len(holders)]
    return calibrate(model, plan, options, batches, ranks)


def calibrate(
    model: Any,
    plan: ExportPlan,
    options: Options,
    batches: Sequence[torch.Tensor],
    ranks: Ranks | None = None,
) -> QuantizerState:
    """Run ``model`` on ``batches`` (int64 (1, length) each) and keep the largest magnitude each quantizer
    sees, of several ``ranks`` on any of them; a rank without batches needs no model.

    Nothing is quantized meanwhile, weights included. Works under accelerate's offload. The model is as before
    afterwards. Raises `UsageError` for a model that does not take token ids alone, `ArtifactError` for a layer that no
    text reached and for a range that is not finite.
    """
    specs = input_specs(plan) if options.activations else {}
    ranges = InputRanges()
    measured = [name for name, spec in specs.items() if spec in CALIBRATED]
    if batches:
        _run(model, batches, measured, ranges, kv_cache=bool(options.kv_cache))
    ranges.largest = largest_of_all(ranks or Ranks(), ranges.largest)
    ranges.require(measured)
    seen = ranges.largest
    specs |= {name: str(options.kv_cache) for name in seen if name not in specs}
    state = QuantizerState(specs, {f"{name}.amax": amax for name, amax in seen.items()})
    check_state(state)
    return state


def _run(
    model: Any, batches: Sequence[torch.Tensor], measured: list[str], ranges: InputRanges, *, kv_cache: bool
) -> None:
    import torch

    training = model.training
    with ExitStack() as stack:
        changes = {name: partial(ranges.record, name) for name in measured}
        stack.callback(change_quantizer_inputs(model, changes))
        if kv_cache:
            stack.enter_context(keys_and_values(model, ranges.record))
        for layer in _offloaded_layers(model):
            stack.callback(layer.register_forward_hook(lambda *_: return_memory()).remove)
        if training:
            model.eval()
            stack.callback(model.train)
        # Not inference mode: tensors that accelerate brings in during a pass would stay marked after it.
        stack.enter_context(torch.no_grad())
        stack.enter_context(on_token_ids(partial(_refused, type(model).__name__)))
        for batch in batches:
            model(
                input_ids=batch.to(model.get_input_embeddings().weight.device if _resident(model) else "cpu")
            )


def _refused(name: str, why: str) -> UsageError:
    what = f"no text can be given to {name}: it {why}"
    return UsageError(what, "Leave --calibrate out, and quantize weights alone or inputs by a dynamic format")


def _offloaded_layers(model: Any) -> list[Any]:
    """The decoder layers that accelerate moves to the device for a pass and back."""
    from loadstone.loading.layers import layer_stack

    stack = layer_stack(model)
    layers: Any = [] if stack is None else stack.layers
    return [layer for layer in layers if any(p.device.type == "meta" for p in layer.parameters())]


def _resident(model: Any) -> bool:
    return model.get_input_embeddings().weight.device.type != "meta"


def token_batches(
    documents: Sequence[Any], source: Artifact | Path | None, config: Any, *, trust_remote_code: bool = False
) -> list[torch.Tensor]:
    """``documents`` (texts, or int64 token tensors) as batches of one, cut to what the model takes.

    ``source``: what has the tokenizer. Raises `UsageError` without one, and when no document holds a token.
    """
    import torch

    from loadstone.loading.positions import positions

    limit = min(_CONTEXT, positions(config).limit or _CONTEXT)
    texts = [d for d in documents if isinstance(d, str)]
    tokenizer = None
    if texts:
        if source is None:
            raise UsageError(
                "calibration text needs the model's tokenizer", "Pass sidecars=DIR, or token tensors"
            )
        from loadstone.loading import load_tokenizer

        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    batches = []
    for document in documents:
        if isinstance(document, str):
            assert tokenizer is not None
            ids = torch.tensor(tokenizer(document, truncation=True, max_length=limit)["input_ids"])
        else:
            ids = document.reshape(-1)[:limit]
        if ids.numel():
            batches.append(ids.long()[None])
    known = getattr(config.get_text_config(), "vocab_size", None)
    if batches and isinstance(known, int):
        name = str(source.root if isinstance(source, Artifact) else source or type(config).__name__)
        require_known(int(max(batch.max() for batch in batches)), known, tokenizer, name)
    if not batches:
        raise UsageError("there is no text to calibrate on", "Give a file with text")
    return batches


def _loaded(artifact: Artifact, options: Options, ranks: Ranks) -> Any:
    """The model where it was asked for; with ``auto`` under accelerate's offload when it does not fit.

    Of several ranks, those of a machine whose memory holds a copy for each; on GPUs each on its own where a copy fits
    every one. Rank 0 always, in the dtype that it would take alone; None on a rank without room.
    """
    import torch
    from accelerate.utils import get_max_memory

    from loadstone.loading import load
    from loadstone.loading import plan as load_plan
    from loadstone.loading.placement import weight_bytes

    dtype, device, takes_part = "auto", options.device, True
    if device == "cpu" or not torch.cuda.is_available():
        free = get_max_memory()["cpu"]
        # A CPU emulates bfloat16 products, several times slower: float32 where it fits.
        dtype = "float32" if weight_bytes(artifact, "float32") * 1.5 < free else "auto"
        # The same products on all machines. Nobody loads before all have looked.
        dtype = ranks.gather(dtype)[0]
        takes_part = (ranks.local_rank + 1) * weight_bytes(artifact, dtype) * 1.5 < free
    elif ranks.size > 1:
        own = ranks.device("cuda")
        fits = weight_bytes(artifact) * 1.1 < torch.cuda.mem_get_info(own)[0]
        takes_part = all(ranks.gather(fits))
        device = own if takes_part else device
    if ranks.rank and not takes_part:
        return None
    plan = load_plan(artifact, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code)
    return load(plan)
