"""Single entry point for loading a language model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, detect
from loadstone.artifact.files import check_folder, translated
from loadstone.artifact.unchanged import check_unchanged
from loadstone.errors import ArtifactError, UsageError
from loadstone.loading.devices import cpu_by_default
from loadstone.loading.offline import offline
from loadstone.loading.plan import FROM_PRETRAINED, IN_CONTEXT, LoadPlan, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@cpu_by_default
def load(
    target: str | Path | Artifact | LoadPlan, *, fast: bool = False, mesh: Any = None, **options: Any
) -> PreTrainedModel:
    """Load any artifact as an ordinary transformers model in eval mode.

    ``target``: a directory, or a plan that `plan` made. ``options`` are `plan`'s: ``device`` (auto, cpu, cuda,
    cuda:N), ``dtype`` (auto, float32, bfloat16, float16), ``checkpoint``, ``trust_remote_code``, ``native_kernels``.
    ``fast``: write tokens faster with quantized layers, on a GPU weight-only ones, to rounding; such a model is not
    saved again.
    ``mesh``: a one-dimensional `DeviceMesh` of ranks that each load their part, by transformers' tensor-parallel plan;
    ``device`` is then this rank's.

    Raises `ArtifactError` (damaged, or cannot be loaded here), `MissingError` (package or GPU) or `UsageError` (also
    for options beside a plan, which has its own).
    """
    import torch

    from loadstone.loading.placement import resolve_device

    if isinstance(target, LoadPlan) and options:
        raise UsageError(f"{', '.join(options)}: a plan is loaded as it is", "Give options to plan()")
    chosen = target if isinstance(target, LoadPlan) else plan(target, **options)
    if chosen.load_path == IN_CONTEXT:
        raise ArtifactError(
            f"'{chosen.artifact.root}' is an in-context model, not a transformers model", "Use loadstone.load"
        )
    import_libraries()
    from loadstone.loading.adapters import placed
    from loadstone.loading.native import load_native
    from loadstone.loading.pretrained import load_pretrained
    from loadstone.loading.tensor_parallel import failing_together

    chosen = replace(chosen, artifact=placed(chosen.artifact, chosen.trust_remote_code))
    device_map = resolve_device(chosen.device, chosen.artifact, chosen.dtype)
    for folder in dict.fromkeys((chosen.artifact.path, *chosen.artifact.sidecar_dirs)):
        check_folder(folder)
    # torchao's tensors cannot be made from inference tensors, so a caller's inference mode ends here.
    with torch.inference_mode(False), offline():
        if chosen.load_path == FROM_PRETRAINED:
            model = load_pretrained(chosen, device_map)
        elif mesh is None:
            model = load_native(chosen, device_map)
        else:
            with failing_together(mesh, chosen.artifact):
                model = load_native(chosen, device_map, mesh)
    model.eval()
    check_unchanged(chosen.artifact.path, chosen.artifact.stamp)
    if fast:
        from loadstone.loading.few_rows import speed_up_decoding

        speed_up_decoding(model)
    return model


def load_tokenizer(target: str | Path | Artifact | LoadPlan, *, trust_remote_code: bool = False) -> Any:
    """The artifact's tokenizer; a checkpoint without one takes that of its training run.

    A directory with a tokenizer and no model will do. Raises `UsageError` or `ArtifactError`.
    """
    import_libraries()
    from transformers import AutoTokenizer

    if isinstance(target, LoadPlan):
        trust_remote_code = trust_remote_code or target.trust_remote_code
        target = target.artifact
    if isinstance(target, Artifact):
        root, directories = target.root, target.sidecar_dirs
    elif _has_tokenizer(Path(target)) and not (Path(target) / "config.json").is_file():
        root, directories = Path(target), (Path(target),)
    else:
        artifact = detect(target)
        root, directories = artifact.root, artifact.sidecar_dirs
    for directory in directories:
        if _has_tokenizer(directory):
            check_folder(directory)
            with offline(), translated(f"'{directory}': the tokenizer cannot be loaded", _TOKENIZER):
                return AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=trust_remote_code
                )
    raise ArtifactError(f"'{root}' has no tokenizer (none of {', '.join(TOKENIZER_FILES)})", _TOKENIZER)


@contextmanager
def using(tokenizer: Any) -> Iterator[None]:
    """Within the block, what a tokenizer fails with is an `ArtifactError`: it accepts settings of any type, and fails
    on them when it is used."""
    with translated(f"'{tokenizer.name_or_path}': its tokenizer fails", _TOKENIZER):
        yield


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def import_libraries() -> None:
    """Import torchao and transformers, one thread at a time and without notices about what this machine lacks.

    transformers resolves its names lazily, and two threads doing that at once can fail with an ImportError.
    """
    with _IMPORTING:
        loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            import torchao.prototype.mx_formats
            import torchao.quantization  # noqa: F401
            from transformers import (  # noqa: F401
                AutoConfig,
                AutoModelForCausalLM,
                AutoTokenizer,
                GenerationConfig,
                PreTrainedModel,
            )
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_IMPORTING = threading.Lock()
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
_TOKENIZER = "Copy tokenizer.json and tokenizer_config.json from the source model"
