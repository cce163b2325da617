"""No network while a local model is loaded, whatever its config asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LOADING: ContextVar[bool] = ContextVar("loading_a_local_model", default=False)
_INSTALLED = False


@contextmanager
def offline() -> Iterator[None]:
    """Within the block, and in this thread only, every request to the hub is refused.

    Other threads go on: data that the user named may be on its way.
    """
    global _INSTALLED
    if not _INSTALLED:
        _INSTALLED = True
        # The function that huggingface_hub asks before each request.
        from huggingface_hub import constants

        asked = constants.is_offline_mode
        constants.is_offline_mode = lambda: _LOADING.get() or asked()
    token = _LOADING.set(True)
    try:
        yield
    finally:
        _LOADING.reset(token)
