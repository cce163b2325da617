"""``--parallel tensor=N``: each copy of a model is divided among N ranks; the copies divide the batches."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from loadstone.errors import MissingError, UsageError
from loadstone.evaluation.loaded import fits, held_together, input_device
from loadstone.evaluation.measure import free_bytes
from loadstone.evaluation.models import EvalModel
from loadstone.evaluation.options import Options
from loadstone.loading.placement import weight_bytes
from loadstone.loading.tensor_parallel import divided_share
from loadstone.ranks import Ranks

log = logging.getLogger(__name__)
# How long a rank waits for another one that still reads its part.
_PATIENCE = timedelta(hours=2)


def divide_models(
    models: tuple[EvalModel, ...], options: Options, ranks: Ranks
) -> tuple[tuple[EvalModel, ...], Ranks]:
    """The models, to be loaded in parts where that was asked for or one does not fit a GPU, and the ranks in copies.

    Raises UsageError where that was asked for and cannot be, MissingError where the parts do not fit either.
    """
    size = _asked(options, ranks)
    if size is None:
        size = _needed(models, options, ranks)
    else:
        _check(models, options, ranks, size)
    if size == 1:
        return models, ranks
    if ranks.size > size:
        log.info("%d copies, of %d ranks each, divide the batches", ranks.size // size, size)
    mesh = _mesh(ranks, size, input_device(models[0].plan))
    return tuple(replace(model, mesh=mesh) for model in models), ranks.in_copies(size)


def _asked(options: Options, ranks: Ranks) -> int | None:
    """The ranks that hold a copy together, None where nothing was said about them."""
    if options.parallel is None:
        return None
    found = re.fullmatch(r"tensor(?:=([1-9]\d{0,5}))?", options.parallel)
    if found is None:
        raise UsageError(f"--parallel {options.parallel:.40} is not known", "Write tensor, or tensor=N")
    if ranks.size == 1 and found[1] != "1":
        raise UsageError(
            f"--parallel {options.parallel} divides a model among processes, and this is one",
            f"Start it with torchrun --nproc-per-node {found[1] or 'gpu'} -m loadstone eval …",
        )
    size = int(found[1] or ranks.size)
    if ranks.size % size:
        raise UsageError(
            f"--parallel {options.parallel}: {ranks.size} ranks do not divide into groups of {size}",
            "Start a multiple of it, or use a divisor",
        )
    return size


def _check(models: Sequence[EvalModel], options: Options, ranks: Ranks, size: int) -> None:
    """Raise an error when the models cannot be divided among ``size`` ranks each."""
    if size == 1:
        return
    for model in models:
        if reason := _prevents(model, options):
            raise UsageError(f"--parallel {options.parallel}: {reason}", "Leave one of the two out")
    device = input_device(models[0].plan)
    if device.type == "cuda":
        if options.device not in ("auto", "cuda"):
            raise UsageError(
                f"--device {options.device} is one card, and --parallel {options.parallel} takes one for each rank",
                "Leave --device out",
            )
        local, cards = _on_this_machine(ranks)
        if local > cards:
            raise MissingError(
                f"--parallel {options.parallel}: {local} ranks of this machine have {cards} GPUs",
                "Start one rank for each",
            )
    shares = {model.name: divided_share(model.plan, size) for model in models}
    for name, share in shares.items():
        log.info("%s: each of %d ranks holds %.0f %% of it", name, size, 100 * share)
    free = free_bytes(device)
    for together in held_together(models, options):
        need = sum(shares[m.name] * weight_bytes(m.plan.artifact, m.plan.dtype) for m in together)
        if device.type == "cuda" and need > free:
            raise MissingError(
                f"'{together[-1].name}': a part for each of {size} ranks takes {need / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB of {device} are free",
                "Divide it among more ranks, or leave --parallel out: it is then streamed layer by layer",
            )


def _on_this_machine(ranks: Ranks) -> tuple[int, int]:
    """The ranks and the GPUs of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), torch.cuda.device_count()


def _prevents(model: EvalModel, options: Options) -> str:
    """What of a model or the options does not go with dividing it; empty where nothing does."""
    if model.prefix is not None:
        return f"'{model.name}' is a prefix, which holds keys and values of a whole model"
    if model.has_quantizers:
        return f"'{model.name}' rounds inputs of layers, which no rank sees whole"
    if options.stream:
        return "--stream reads one layer at a time instead"
    if options.compile:
        return "--compile compiles layers of one device"
    return "--speed measures one device" if options.speed else ""


def _needed(models: Sequence[EvalModel], options: Options, ranks: Ranks) -> int:
    """The fewest ranks that a copy must be divided among to fit their GPUs: 1 where it fits one, or cannot be
    divided."""
    on_gpus = input_device(models[0].plan).type == "cuda" and options.device in ("auto", "cuda")
    if ranks.size == 1 or options.stream is not None or not on_gpus:
        return 1
    # Free memory may differ between the GPUs; the choice must not.
    if all(ranks.gather(fits(models, options))):
        return 1
    reason = next(filter(None, (_prevents(model, options) for model in models)), "")
    local, cards = _on_this_machine(ranks)
    if local > cards:
        reason = f"{local} ranks of this machine have {cards} GPUs"
    for size in [] if reason else [n for n in range(2, ranks.size + 1) if ranks.size % n == 0]:
        try:
            share = max(divided_share(model.plan, size) for model in models)
        except UsageError as error:
            reason = reason or error.message
            continue
        if all(ranks.gather(fits(models, options, share))):
            log.info("a model does not fit one GPU: it is divided as by --parallel tensor=%d", size)
            return size
        reason = f"a part for each of {size} ranks does not fit"
    log.info("a model does not fit one GPU, and is not divided among ranks: %s", reason)
    return 1


def _mesh(ranks: Ranks, size: int, device: torch.device) -> Any:
    """The ranks of this process's copy, as a one-dimensional device mesh."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if device.type == "cuda":
        torch.cuda.set_device(device)
    groups = [
        # Every rank takes part in making every group.
        dist.new_group(
            list(range(first, first + size)),
            timeout=_PATIENCE,
            backend="nccl" if device.type == "cuda" else "gloo",
        )
        for first in range(0, ranks.size, size)
    ]
    return DeviceMesh.from_group(groups[ranks.rank // size], device.type)
