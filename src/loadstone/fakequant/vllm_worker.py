"""A vLLM worker that restores an export's quantizers of inputs, keys and values.

``vllm serve EXPORT --enforce-eager --worker-cls loadstone.fakequant.vllm_worker.FakeQuantWorker``. Without
it vLLM loads the same directory and computes with the folded weights alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from loadstone.errors import UsageError
from loadstone.fakequant.state import read_state
from loadstone.fakequant.vllm_inputs import apply_to_vllm

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

log = logging.getLogger(__name__)


class FakeQuantWorker(BaseWorker):
    """vLLM's own worker, with the quantizers put in before the model is warmed up."""

    def compile_or_warm_up_model(self) -> Any:
        """What vLLM's worker returns (seconds, or a record of times), unchanged: executors compare it
        over ranks."""
        config = self.vllm_config
        if not config.model_config.enforce_eager:
            raise UsageError(
                "quantizers of inputs are hooks, which compiled graphs leave out", "Pass --enforce-eager"
            )
        state = read_state(Path(config.model_config.model))
        count = apply_to_vllm(self.model_runner.model, state, config.parallel_config.tensor_parallel_size)
        log.info("%d layers of vLLM's model quantize their inputs", count)
        return super().compile_or_warm_up_model()
