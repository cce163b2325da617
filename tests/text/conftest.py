"""Small real tokenizers, made once a session."""

from __future__ import annotations

from typing import Any

import pytest
from tests.small_models import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    return make_tokenizer(bos="<begin>")


@pytest.fixture(scope="session")
def tokenizer_factory() -> Any:
    return make_tokenizer
