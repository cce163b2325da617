"""Whether a model's class predicts next tokens, from its config alone, and whether a model takes token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loadstone.artifact import Artifact
from loadstone.errors import LoadstoneError, UsageError
from loadstone.loading.model_class import load_config, model_class_of

EVAL = "eval on text"


def require_language_model(
    artifact: Artifact, name: str, *, trust_remote_code: bool = False, by: str = EVAL
) -> None:
    """Raise UsageError, before anything is loaded, for a class that does not predict next tokens. ``by``: what needs a
    language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = load_config(artifact, trust_remote_code)
    cls = model_class_of(config, artifact, trust_remote_code)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is causal or not cls.__module__.startswith("transformers."):
        # The probe has the last word.
        return
    try:
        config.get_text_config()
    except ValueError:
        raise refused(name, cls.__name__, "has several parts that read text", by) from None
    if getattr(config, "is_encoder_decoder", False):
        raise refused(
            name, cls.__name__, "writes an output for an input, and plain text has no such pairs", by
        )
    if not cls.can_generate():
        why = "does not predict next tokens"
        if causal is not None and cls is MODEL_MAPPING.get(type(config), None):
            why = "stores no output head"
        raise refused(name, cls.__name__, why, by)


def refused(name: str, kind: str, why: str, by: str = EVAL) -> UsageError:
    """The error for a model that does not predict next tokens."""
    return UsageError(
        f"'{name}' is a {kind}, which {why}: {by} needs a causal language model",
        "Load it with loadstone.load, and measure it on its own task" if by == EVAL else "Name one with -M",
    )


@contextmanager
def on_token_ids(refusal: Callable[[str], LoadstoneError]) -> Iterator[None]:
    """Within the block a model runs on token ids alone; raises ``refusal`` of the reason where it does not."""
    import torch

    try:
        yield
    except (LoadstoneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: inputs that are missing, shapes that do not fit
        reason = " ".join(str(error).split())[:160] or "no reason given"
        raise refusal(f"does not take token ids alone ({type(error).__name__}: {reason})") from None
