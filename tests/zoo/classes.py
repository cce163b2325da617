"""Which class a user of a model type saves."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

# The first mapping that has the type gives the class.
ORDER = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "CTC",
    "RNNT",
    "TDT",
    "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "IMAGE_MATTING",
    "MASK_GENERATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "POSE_ESTIMATION",
    "TABLE_RECOGNITION",
    "TEXT_RECOGNITION",
    "VIDEO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "IMAGE_TO_IMAGE",
    "AUDIO_CLASSIFICATION",
    "RETRIEVAL",
    "DECISION",
    "NORMAL_ESTIMATION",
    "POINTMAP_ESTIMATION",
    "TIME_SERIES_PREDICTION",
    "TABLE_QUESTION_ANSWERING",
    "QUESTION_ANSWERING",
    "PRETRAINING",
    "BACKBONE",
    "IMAGE",
)
# The heads of Sapiens2 have sizes without a default.
CLASSES = {"sapiens2": "Sapiens2Backbone"}
SEQ_TO_SEQ = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


@lru_cache
def _auto() -> Any:
    from transformers.models.auto import modeling_auto

    return modeling_auto


def mapping(task: str) -> dict[str, Any]:
    """Model type to class name, as transformers registers it for one task."""
    name = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
    return getattr(_auto(), name, {})


def model_types() -> list[str]:
    """Every registered model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str, config: Any) -> Any:
    """The class for this type, or None where transformers has none that stands alone."""
    import transformers

    config_class = type(config)
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    # Encoder-decoders and masked models also have a causal class, which few save.
    first = SEQ_TO_SEQ if config.is_encoder_decoder else ("MASKED_LM",)
    names = [mapping(task).get(model_type) for task in (*first, *ORDER, "")]
    classes = [getattr(transformers, n if isinstance(n, str) else n[0], None) for n in names if n]
    # A composite type is also registered with the class of its text part, which takes another configuration.
    own = [found for found in classes if found is not None and found.config_class is config_class]
    return next(iter([*own, *filter(None, classes)]), None) or _of_module(config_class)


def _of_module(config_class: type) -> Any:
    """A type without an auto class: the last class of its own module that takes its configuration."""
    import importlib

    from transformers import PreTrainedModel

    try:
        module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        return None
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.config_class is config_class
        and not name.endswith("PreTrainedModel")
    ]
    return found[-1] if found else None
