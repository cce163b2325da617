"""The models of an evaluation: how each will be loaded, in one common dtype."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loadstone.artifact import Artifact
from loadstone.artifact.context_file import PREFIX, ContextFile, is_context, read_context, require_kind
from loadstone.artifact.detect import FAKEQUANT, PFN
from loadstone.artifact.kinds import holds_adapter
from loadstone.errors import UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.served_inputs import inputs_rounded
from loadstone.loading import LoadPlan, plan
from loadstone.loading.adapters import placed
from loadstone.loading.language_model import require_language_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalModel:
    """A model to be evaluated and how it will be loaded.

    ``name``: as the user gave it. ``reference``: the others are compared with it. ``given``: named among the models,
    not as the baseline only. ``prefix``: the language-model prefix when one was named; ``plan`` is then its base's.
    ``inputs``: how its layers round their inputs (``--activations``); empty where they do not. ``mesh``: the ranks that
    hold its parts; None where each holds it whole."""

    name: str
    plan: LoadPlan
    reference: bool
    given: bool
    prefix: ContextFile | None = None
    inputs: str = ""
    mesh: Any = None

    @property
    def has_quantizers(self) -> bool:
        """Whether its modules get quantizers of inputs, keys and values as hooks: those of a fake-quant export, or
        those that ``--activations`` asks for."""
        return self.plan.artifact.kind == FAKEQUANT or bool(self.inputs)

    def fingerprint(self) -> str:
        """Content hash of its weights, and of the prefix before them."""
        log.debug("hashing %s", self.name)
        weights = self.plan.artifact.fingerprint()
        return weights if self.prefix is None else f"{weights} {self.prefix.facts['digest']}"


def plan_models(options: Options, device: str, *, referenced: bool = False) -> tuple[EvalModel, ...]:
    """Plan every model, the reference (the baseline, or the first of several) first, in one common dtype.

    ``referenced``: the reference is a saved result, so none of these is.
    """
    if not options.models:
        raise UsageError("no model to evaluate", "Name a directory with -M")
    names = list(dict.fromkeys([options.baseline or options.models[0], *options.models]))
    if options.baseline is not None and len(names) == 1:
        raise UsageError(f"the baseline '{options.baseline}' is the only model", "Name another with -M")
    prefixes = choose_prefixes(names, options)
    if prefixes[0] is not None:
        options = replace(options, dtype=prefixes[0].facts["numerics"]["dtype"])
    plans = [
        plan(
            name if prefix is None else find_prefix_base(prefix, options),
            device=device,
            dtype=options.dtype,
            checkpoint=options.checkpoint if name in options.models else None,
            no_checkpoint=options.no_checkpoint and name in options.models,
            trust_remote_code=options.trust_remote_code,
            native_kernels=options.native_kernels,
            base=options.base if prefix is None and holds_adapter(name) else None,
        )
        for name, prefix in zip(names, prefixes, strict=True)
    ]
    plans = [replace(p, artifact=placed(p.artifact, p.trust_remote_code)) for p in plans]
    for name, planned in zip(names, plans, strict=True):
        if planned.artifact.kind == PFN:
            raise UsageError(
                f"'{name}' predicts tables, and eval on text needs a language model",
                "Fit it to a table first (loadstone fit --table), and evaluate the context",
            )
        require_language_model(planned.artifact, name, trust_remote_code=planned.trust_remote_code)
    if options.dtype == "auto":
        dtype, why = compute_dtype(plans[0], device)
        log.info("computing in %s: %s", dtype, why)
        plans = [replace(p, dtype=dtype) for p in plans]
    inputs = [inputs_rounded(p.artifact) if options.activations else "" for p in plans]
    if options.activations and not any(inputs):
        raise UsageError(
            f"--activations: '{names[-1]}' has no quantized inputs that are left as they are",
            "It is for compressed-tensors artifacts whose scheme rounds inputs (W8A8, FP8 dynamic, NVFP4)",
        )
    return tuple(
        EvalModel(
            name,
            p,
            reference=len(names) > 1 and i == 0 and not referenced,
            given=name in options.models,
            prefix=prefix,
            inputs=rounded,
        )
        for i, (name, p, prefix, rounded) in enumerate(zip(names, plans, prefixes, inputs, strict=True))
    )


def choose_prefixes(names: list[str], options: Options) -> list[ContextFile | None]:
    """The language-model prefix that each name stands for, None for a plain model.

    Losses are compared token by token, so either no model has a prefix or all have prefixes of the same prompt. Raises
    UsageError otherwise, and for options that do not apply to a prefix.
    """
    from loadstone.context.prefix.store import check_facts

    files: list[ContextFile | None] = []
    for name in names:
        if not is_context(Path(name)):
            files.append(None)
            continue
        require_kind(Path(name), PREFIX, by="eval on text")
        file = read_context(Path(name), verify=True)
        check_facts(file)
        files.append(file)
    found = [file for file in files if file is not None]
    if not found:
        return files
    if len(found) < len(files):
        plain = names[files.index(None)]
        raise UsageError(
            f"'{plain}' is a model and '{found[0].path}' a prefix: they see different contexts",
            "Make a prefix of the same prompt with it (loadstone fit --prompt)",
        )
    first = found[0].facts
    for other in found[1:]:
        if other.facts["prompt"]["sha256"] != first["prompt"]["sha256"]:
            raise UsageError(
                f"'{found[0].path}' and '{other.path}' are prefixes of different prompts: no comparison",
                "Make both of the same prompt, or evaluate them one at a time",
            )
        if other.facts["numerics"]["dtype"] != first["numerics"]["dtype"]:
            raise UsageError(
                f"'{found[0].path}' was made in {first['numerics']['dtype']}, '{other.path}' in "
                f"{other.facts['numerics']['dtype']}: no comparison",
                "Make both in one dtype (finalize --dtype)",
            )
    if options.dtype not in ("auto", first["numerics"]["dtype"]):
        raise UsageError(
            f"--dtype {options.dtype}: the prefix was made in {first['numerics']['dtype']}", "Leave it out"
        )
    for flag, given in (("--compile", options.compile), ("--speed", options.speed)):
        if given:
            raise UsageError(f"{flag} has no meaning after a prefix", "Leave it out")
    return files


def find_prefix_base(file: ContextFile, options: Options) -> Artifact:
    """The base of a prefix, its recipe and tokenizer checked."""
    from loadstone.context.prefix.store import check_base, find_base
    from loadstone.loading import load_tokenizer

    artifact = find_base(file, options.base)
    check_base(file, artifact, load_tokenizer(artifact, trust_remote_code=options.trust_remote_code))
    return artifact


def compute_dtype(reference: LoadPlan, device: str) -> tuple[str, str]:
    """float32 on a CPU, the stored dtype on a GPU; and the reason for it."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        return (
            "float32",
            "most CPUs emulate bfloat16 and are several times slower with it; float32 agrees between CPUs",
        )
    config = reference.artifact.config
    config = {**config, **(config.get("text_config") or {})}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return (
        stored if stored in ("float32", "float16") else "bfloat16"
    ), "the dtype of the reference model's weights"
