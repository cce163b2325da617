"""Small real models and a small real tokenizer, made once a session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_models import make_model, save
from tests.text import conftest as text

torch.set_num_threads(1)
tokenizer, bos_tokenizer, tokenizer_factory = text.tokenizer, text.bos_tokenizer, text.tokenizer_factory


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> Iterator[None]:
    """Each evaluation frees its model by a collection, which takes a quarter of a second for all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="session")
def model_dir(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tokenizer, tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def worse_dir(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with noise on its weights: higher loss on average, not on every document."""
    import copy

    noisy = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return save(noisy, tokenizer, tmp_path_factory.mktemp("model") / "worse")


@pytest.fixture(scope="session")
def model_factory() -> Any:
    return make_model


@pytest.fixture(scope="session")
def save_model() -> Any:
    return save
