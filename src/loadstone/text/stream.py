"""A corpus in tokens, of any length: what a position holds is found from the offsets of documents."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loadstone.text.corpus import Corpus

# Positions at a time, where all of them are read.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of documents, each after its prompt, without separators.

    ``ids``: int32, all of them. ``prompts``, ``texts``: int64 (documents,), how many tokens the prompt of a document
    has, and the document. ``bytes``, ``words``: int64 (documents,), UTF-8 bytes and whitespace-separated words of each
    document. ``mapping``: the file that ``ids`` is mapped from.
    """

    ids: np.ndarray
    prompts: np.ndarray
    texts: np.ndarray
    bytes: np.ndarray
    words: np.ndarray
    mapping: mmap.mmap | None = None

    def take(self, places: np.ndarray) -> np.ndarray:
        """The ids at ``places``, int64."""
        found = self.ids[places].astype(np.int64)
        if self.mapping is not None:
            # What was read stays in the page cache, and does not add up in the process.
            self.mapping.madvise(mmap.MADV_DONTNEED)
        return found


@dataclass(frozen=True, eq=False)
class TokenStream:
    """``[sep] prompt 0, document 0 [sep] prompt 1, document 1 ...``: ``S`` positions, separators included.

    Separators and prompts are read and not scored. The tokens of documents are numbered in order: a token's number is
    its slot in the vectors of per-token values.
    """

    tokens: Tokens
    separator_id: int
    separator: str
    adds_bos: bool
    tokenizer_sha256: str
    corpus: Corpus
    chat_template_sha256: str = ""

    @cached_property
    def starts(self) -> np.ndarray:
        """Positions of the separators, and S: int64 (documents + 1,)."""
        return np.concatenate(([0], np.cumsum(1 + self.tokens.prompts + self.tokens.texts)))

    @cached_property
    def firsts(self) -> np.ndarray:
        """The position of each document's first token: int64 (documents,)."""
        return self.starts[:-1] + 1 + self.tokens.prompts

    @cached_property
    def slots(self) -> np.ndarray:
        """The slot of each document's first token, and the number of slots: int64 (documents + 1,)."""
        return np.concatenate(([0], np.cumsum(self.tokens.texts)))

    @property
    def size(self) -> int:
        """S."""
        return int(self.starts[-1])

    @property
    def count(self) -> int:
        """The number of tokens of documents."""
        return int(self.slots[-1])

    @cached_property
    def ids(self) -> np.ndarray:
        """All token ids, int64 (S,): for short texts, as `document` and `scored`."""
        return self.ids_at(np.arange(self.size))

    @cached_property
    def document(self) -> np.ndarray:
        """The document of each position, -1 at separators and prompts: int32 (S,)."""
        return self._documents(np.arange(self.size))

    @cached_property
    def scored(self) -> np.ndarray:
        """Positions of the tokens of documents, ascending: int64 (tokens,)."""
        return np.flatnonzero(self.document >= 0)

    def owner(self, positions: np.ndarray) -> np.ndarray:
        """The document, or its separator or prompt, that each position is in."""
        return np.searchsorted(self.starts[:-1], positions, side="right") - 1

    def is_text(self, positions: np.ndarray) -> np.ndarray:
        """Whether each position is a token of a document."""
        return positions >= self.firsts[self.owner(positions)]

    def slot(self, positions: np.ndarray) -> np.ndarray:
        """How many tokens of documents are before each position, 0 to S; for such a token that is its slot."""
        owner = self.owner(positions)
        return self.slots[owner] + np.maximum(positions - self.firsts[owner], 0)

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """The token ids at positions, of the same shape: int64."""
        return self.read(positions)[0]

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The token ids at positions, int64, and whether each is a token of a document; both of the same shape."""
        owner = self.owner(positions)
        separator = positions == self.starts[owner]
        # In place of a separator any id is read.
        places = positions - owner - 1 + separator
        found = self.tokens.take(np.minimum(places, len(self.tokens.ids) - 1))
        found[separator] = self.separator_id
        return found, positions >= self.firsts[owner]

    def text(self, document: int, limit: int | None = None) -> np.ndarray:
        """The first ``limit`` token ids of a document, int64."""
        first = self.firsts[document]
        count = int(self.tokens.texts[document])
        return self.ids_at(first + np.arange(count if limit is None else min(count, limit)))

    @cached_property
    def highest(self) -> int:
        """The highest token id."""
        return max(int(self.ids_at(block).max()) for block in self._blocks())

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids, and of which are scored: equal for two models if they predict the same tokens."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(self.ids_at(block).astype("<i8").tobytes())
        if self.tokens.prompts.any():
            for block in self._blocks():
                digest.update(self._documents(block).astype("<i4").tobytes())
        return digest.hexdigest()

    def _documents(self, positions: np.ndarray) -> np.ndarray:
        return np.where(self.is_text(positions), self.owner(positions), -1).astype(np.int32)

    def _blocks(self) -> Iterator[np.ndarray]:
        for at in range(0, self.size, _BLOCK):
            yield np.arange(at, min(at + _BLOCK, self.size))
