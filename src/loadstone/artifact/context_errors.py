"""What can be wrong with a fitted context, as types: every one names what differs and says what to do."""

from __future__ import annotations

from loadstone.errors import ArtifactError, UsageError


class BaseMismatch(ArtifactError):
    """The base model's parameters are not those the context was fitted with: values, names or shapes."""


class ArchitectureMismatch(ArtifactError):
    """The base model has another depth, width or head layout than the context."""


class SchemaMismatch(ArtifactError):
    """The query's features differ from the fitted ones in number, name or order."""


class CorruptContext(ArtifactError):
    """Bytes on disk are not those that were written: a flipped bit, a truncated file, an inconsistent table."""


class FormatUnsupported(ArtifactError):
    """The context has a format version, kind or dtype that this version or device cannot use."""


class UnsafeContent(ArtifactError):
    """The directory holds what no context needs: a pickle, a link or path that leaves it."""


class ProbeFailed(ArtifactError):
    """The loaded context does not repeat the logits recorded when it was fitted."""


class TokenizerMismatch(ArtifactError):
    """The base's tokenizer or chat template is not the one that a language-model prefix was made with."""


class RecipeMismatch(ArtifactError):
    """The base is quantized by another recipe than the model that made the context, or not quantized."""


class KindMismatch(UsageError):
    """A context of one kind was given to what works with another."""
