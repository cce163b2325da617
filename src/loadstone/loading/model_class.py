"""The class and the config of an artifact's model, and building it under settings that belong to the process."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.files import check_folder, translated
from loadstone.errors import ArtifactError, LoadstoneError, MissingError
from loadstone.loading.bounds import bounded, check_config
from loadstone.loading.offline import offline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
# transformers builds models under settings of the whole process (default dtype, how weights are initialised and tied).
BUILDING = threading.RLock()


def load_config(artifact: Artifact, trust_remote_code: bool = False) -> Any:
    """The transformers config of an artifact, without its quantization block (the tensors describe themselves)."""
    from transformers import AutoConfig

    check_config(artifact, trust_remote_code)
    check_folder(artifact.config_dir)
    try:
        with offline():
            config = AutoConfig.from_pretrained(
                artifact.config_dir, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # of many kinds: each config class checks its own fields
        if artifact.needs_remote_code and not trust_remote_code:
            raise remote_code_refused(artifact) from None
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{artifact.config_dir}/config.json: transformers refuses it ({reason})", _remedy(artifact)
        ) from None
    if not isinstance(config.architectures or [], list):
        # `detect` has refused such a file: it was exchanged since.
        raise ArtifactError(
            f"{artifact.config_dir}/config.json: architectures is not a list", _remedy(artifact)
        )
    _check_dtype(artifact, config)
    for part in _parts(config):
        _usable_attention(artifact, part)
        # A part with a block of its own would be built for its quantizer's kernels.
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if artifact.adapter is not None and artifact.adapter.config_changes:
        config = type(config).from_dict(config.to_dict() | artifact.adapter.config_changes)
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A config, and the configs of the model's parts (text, vision, …) in it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _check_dtype(artifact: Artifact, config: Any) -> None:
    """Raise `ArtifactError` for a dtype that no model computes in, which transformers refuses once it builds one."""
    import torch

    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if config.dtype is not None and not isinstance(config.dtype, dict) and config.dtype not in known:
        raise ArtifactError(
            f"{artifact.config_dir}/config.json: a model cannot compute in the dtype "
            f"{ascii(str(config.dtype).removeprefix('torch.'))[:80]}",
            "Write the dtype that it was trained in: bfloat16, float16 or float32",
        )


def _usable_attention(artifact: Artifact, config: Any) -> None:
    """Take transformers' own choice where a config asks for flash attention that is not installed, with a warning.

    It is another way to compute the same; a model that is quantized or loaded on a CPU need not have it.
    """
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

    found = {
        f"flash_attention_{version}": facts["general_availability_check"]
        for version, facts in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
    }
    asked = config._attn_implementation
    if isinstance(asked, str) and (here := found.get(asked)) is not None and not here():
        log.warning(
            "%s/config.json asks for %s, which is not installed: not used", artifact.config_dir, asked
        )
        config._attn_implementation = None


def model_class_of(config: Any, artifact: Artifact, trust_remote_code: bool = False) -> Any:
    """The class that ``architectures`` names, else transformers' causal language model for this config.

    With ``trust_remote_code`` the causal language model of the directory's own code comes first, as it does in
    `from_pretrained`.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    reference = _own_code(getattr(config, "auto_map", None) or {}, config.architectures or ())
    if trust_remote_code and reference:
        try:
            return get_class_from_dynamic_module(reference, artifact.config_dir, local_files_only=True)
        except Exception as error:
            raise remote_code_failed(artifact, error) from None
    for name in config.architectures or ():
        if (found := _class_named(config, name)) is not None:
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            try:
                return mapping[type(config)]
            except ValueError:  # a class that transformers names and does not have
                continue
    named = f"class {ascii(config.architectures[0])[:80]}" if config.architectures else "model class"
    raise ArtifactError(
        f"{artifact.config_dir}/config.json: transformers {transformers.__version__} has no {named} for "
        f"'{config.model_type}'",
        _remedy(artifact),
    )


def _class_named(config: Any, name: str) -> Any:
    """transformers' model class of that name, None where it has none.

    Parts of other models (a decoder, a vision tower) are named in their model's module only.
    """
    import transformers

    found = getattr(transformers, name, None)
    package, _, module = type(config).__module__.rpartition(".")
    if found is None and package.startswith("transformers.models."):
        file = sys.modules[type(config).__module__].__file__ or module
        for path in sorted(Path(file).parent.glob("modeling_*.py")):
            try:
                found = found or getattr(import_module(f"{package}.{path.stem}"), name, None)
            except ImportError:  # it needs a package that is not here
                continue
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _remedy(artifact: Artifact) -> str:
    """What to do about a config that transformers refuses or has no class for: by the version that wrote it."""
    from packaging.version import InvalidVersion, Version
    from transformers import CONFIG_MAPPING, __version__

    recorded = artifact.config.get("transformers_version")
    try:
        newer = isinstance(recorded, str) and Version(recorded) > Version(__version__)
    except InvalidVersion:
        newer = False
    if newer:
        return f"It was written by transformers {recorded}, and this is {__version__}: update transformers"
    if artifact.config.get("model_type") not in CONFIG_MAPPING:
        return (
            f"Check model_type: transformers {__version__} has no such model. One with code of its own names it under "
            "auto_map, and a newer one needs a newer transformers"
        )
    return "Restore config.json from the source"


def generation_config(artifact: Artifact, model: PreTrainedModel) -> Any:
    """The generation config beside the weights or in the training run; None for a model that generates nothing."""
    from transformers import GenerationConfig

    file = "generation_config.json"
    folder = next((f for f in artifact.sidecar_dirs if (f / file).is_file()), None)
    if folder is None or not model.can_generate():
        return None
    with translated(f"{folder}/{file}: transformers refuses it", "Restore it from the source, or remove it"):
        # Models that generate in another way have a class of their own (diffusion).
        kind = getattr(model, "generation_config_class", GenerationConfig)
        return kind.from_pretrained(folder, local_files_only=True)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose model keeps embedding and output head apart."""
    changed = config | {"tie_word_embeddings": False}
    for key, value in config.items():
        if isinstance(value, dict) and value.get("tie_word_embeddings"):
            changed[key] = value | {"tie_word_embeddings": False}
    return changed


def _own_code(auto_map: dict[str, Any], architectures: Sequence[str]) -> str | None:
    """Which class of a directory's own code is the model: the one that ``architectures`` names, else the first for the
    causal language model, else any model."""
    models = {key: str(value) for key, value in auto_map.items() if key.startswith("AutoModel")}
    named = [value for value in models.values() if value.rpartition(".")[2] in architectures]
    return next(iter([*named, *filter(None, [models.get("AutoModelForCausalLM")]), *models.values()]), None)


def is_own_code(model_class: Any) -> bool:
    """Whether a class is code that came with a model."""
    return str(model_class.__module__).startswith("transformers_modules.")


def auto_class(artifact: Artifact) -> Any:
    """transformers' Auto class that loads an artifact by its config: the one under which ``auto_map`` names the model,
    else that for causal language models."""
    import transformers

    found = artifact.config.get("auto_map")
    found = found if isinstance(found, dict) else {}
    reference = _own_code(found, artifact.config.get("architectures") or ())
    named = [key for key, value in found.items() if key.startswith("AutoModel") and str(value) == reference]
    return getattr(transformers, named[0] if named else "AutoModelForCausalLM")


@contextmanager
def construction(artifact: Artifact, model_class: Any) -> Iterator[None]:
    """Build a model, one thread at a time; what fails is an `ArtifactError`, and a full GPU a `MissingError`."""
    import torch

    try:
        with BUILDING, offline(), bounded(artifact):
            yield
    except LoadstoneError:
        raise
    except torch.OutOfMemoryError as error:
        raise MissingError(
            f"'{artifact.root}' does not fit the GPU ({' '.join(str(error).split())[:200]})",
            "Use --device auto, which spreads it, or free the GPU",
        ) from error
    except Exception as error:
        if is_own_code(model_class):
            raise remote_code_failed(artifact, error) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"{artifact.config_dir}/config.json: {model_class.__name__} cannot be built from it ({reason})",
            "Restore config.json from the source",
        ) from error


def stored_dtype(artifact: Artifact, config: Any) -> torch.dtype:
    """The floating dtype an artifact computes in: as the config says, else as most of its bytes are stored."""
    import torch

    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sizes: dict[str, int] = {}
    # Scales of packed weights have a dtype of their own.
    parts = {part.name for weight in artifact.packed.values() for part in weight.parts.values()}
    for tensor in artifact.tensors.values():
        if tensor.dtype in names and tensor.name not in parts:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return names[max(sizes, key=lambda k: sizes[k])] if sizes else torch.float32


def has_own_class(artifact: Artifact) -> bool:
    """Whether transformers itself has the class that config.json names, so that code beside it need not run."""
    import transformers

    names = artifact.config.get("architectures") or [""]
    # Listing the names imports nothing; the configs import torch.
    if names[0] not in dir(transformers):
        return False
    from transformers import CONFIG_MAPPING

    return artifact.config.get("model_type") in CONFIG_MAPPING


def remote_code_refused(artifact: Artifact) -> ArtifactError:
    """The error for a model whose class is code in its directory, which was not asked for."""
    return ArtifactError(
        f"{artifact.config_dir}/config.json: auto_map asks to run Python code that came with the model",
        "Read that code, then pass --trust-remote-code if you trust it",
    )


def remote_code_failed(artifact: Artifact, error: Exception) -> LoadstoneError:
    """The error for code of a model's directory that failed: a package that it imports is missing, or it is broken."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ImportError):
        return MissingError(f"'{artifact.root}': its own code imports what is not here ({reason})")
    return ArtifactError(
        f"'{artifact.root}': its own code fails ({type(error).__name__}: {reason})",
        "Ask whoever wrote it, or try another version of transformers",
    )


class quiet_transformers:
    """Its load report speaks of warnings; here each of them is an error of ours, said once.

    The settings are the process's: the first thread to come in changes them, the last to go out puts them back.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: tuple[int, bool] = (0, False)

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        kind = type(self)
        with kind._lock:
            if kind._inside == 0:
                kind._before = hf.get_verbosity(), hf.is_progress_bar_enabled()
                hf.set_verbosity_error()
                hf.disable_progress_bar()
            kind._inside += 1

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf

        kind = type(self)
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0:
                level, bar = kind._before
                hf.set_verbosity(level)
                if bar:
                    hf.enable_progress_bar()
