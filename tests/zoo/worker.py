"""A process that handles many models: ``python -m tests.zoo.worker stock|loadstone`` reads one JSON request a line.

The stock one never imports loadstone: it makes the models and loads every artifact as a user without loadstone does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tests.zoo.inputs import run

# Enough for any tiny model; a worker that asks for more fails instead of taking the machine down.
MEMORY_LIMIT = 12 << 30
# Differ from process to process or say where a model came from.
_SKIPPED = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "_original_object_hash"}


def observe(model: Any, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """What one process reports of a model, so that another can compare it."""
    seen: dict[str, Any] = {
        "attributes": attributes(model),
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "state": {name: digest(tensor) for name, tensor in state(model)},
    }
    if inputs is not None:
        try:
            out = run(model, inputs)
            seen["outputs"] = [digest(tensor) for tensor in out]
            seen["finite"] = all(bool(o.isfinite().any()) for o in out if o.is_floating_point() and o.numel())
        except Exception as error:
            seen["forward_error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return seen


def attributes(model: Any) -> dict[str, Any]:
    """Plain values that the model object carries: class, config, generation config, what quantization left on it."""
    plain = (str, int, float, bool, type(None), torch.dtype, torch.device)
    values = {k: str(v) for k, v in vars(model).items() if isinstance(v, plain) and k not in _SKIPPED}
    values |= {"class": type(model).__name__, "names": sorted(k for k in vars(model) if k not in _SKIPPED)}
    for name in ("is_quantized", "quantization_method", "hf_quantizer", "dtype", "device"):
        value = getattr(model, name, "absent")
        values[name] = str(value) if isinstance(value, plain) else type(value).__name__
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        values["quantizer"] = {
            k: str(v) for k, v in vars(quantizer).items() if isinstance(v, plain) and k not in _SKIPPED
        }
    for name in ("config", "generation_config"):
        value = getattr(model, name, None)
        if value is not None:
            values[name] = _without_names(json.loads(json.dumps(value.to_dict(), default=str)))
            hidden = {k: str(v) for k, v in vars(value).items() if isinstance(v, plain) and k not in _SKIPPED}
            values[f"{name} (hidden)"] = {k: v for k, v in hidden.items() if k.startswith("_")}
    values["frozen"] = sorted(n for n, p in model.named_parameters() if not p.requires_grad)
    return values


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_names(v) for k, v in value.items() if k not in _SKIPPED}
    return [_without_names(v) for v in value] if isinstance(value, list) else value


def state(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under each of its names, buffers that are not saved included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantized tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [piece for name in names for piece in pieces(getattr(tensor, name))]


def digest(tensor: torch.Tensor) -> str:
    """Type, shape, dtype and bytes of a tensor in a few characters."""
    if tensor.device.type == "meta":
        return "meta"
    sha = hashlib.sha256(
        f"{type(tensor).__name__ if is_quantized(tensor) else ''}{tensor.shape}{tensor.dtype}".encode()
    )
    for piece in pieces(tensor):
        plain = piece.detach().contiguous()
        sha.update(f"{plain.shape}{plain.dtype}".encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return sha.hexdigest()[:16]


def is_quantized(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


class Worker:
    """Answers requests; keeps the original's values, to which later artifacts are compared."""

    def __init__(self, stock: bool) -> None:
        self.stock = stock
        self.original: dict[str, torch.Tensor] = {}

    def build(self, model_type: str, path: str) -> dict[str, Any]:
        from tests.zoo.models import NoModel, save

        try:
            return save(model_type, Path(path))
        except NoModel as reason:
            return {"no_model": str(reason)}

    def load(self, path: str, class_name: str) -> tuple[Any, dict[str, Any]]:
        if not self.stock:
            import loadstone

            return loadstone.load(path), {}
        from transformers import AutoConfig

        module, name = class_name.split(":")
        cls = getattr(importlib.import_module(module), name)
        # The config by its model type, as the auto classes read it.
        config = AutoConfig.from_pretrained(path)
        model, info = cls.from_pretrained(path, config=config, output_loading_info=True)
        return model, {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}

    def observe(
        self, path: str, class_name: str, inputs: str, keep: bool = False, compare: bool = False
    ) -> dict[str, Any]:
        """Load a directory and report on it. ``keep``: it is the original; ``compare``: distances to the original."""
        loaded = torch.load(inputs, weights_only=True)
        with captured() as read:
            try:
                model, info = self.load(path, class_name)
                failed = None
            except Exception as error:
                failed = error
        if failed is not None:
            # What stock only prints says more than its exception.
            printed = " ".join(line.strip() for line in read().splitlines() if "Error" in line)
            failed.args = (f"{failed} {printed}"[:600],)
            raise failed
        seen = observe(model, loaded) | {"info": info}
        if keep:
            self.original = {name: tensor.detach() for name, tensor in state(model)}
        if compare:
            seen["distances"], seen["quantized"] = self.distances(model)
        return seen

    def distances(self, model: Any) -> tuple[dict[str, float], int]:
        """Relative distance of each changed tensor to the original's, and how many are quantized."""
        far, quantized = {}, 0
        for name, tensor in state(model):
            value = tensor.detach()
            if is_quantized(value):
                quantized += 1
                value = value.dequantize()
            before = self.original.get(name)
            if before is None or before.shape != value.shape:
                far[name] = -1.0
            elif value.is_floating_point():
                a, b = value.double(), before.double()
                # Equal infinities are no distance apart.
                off = float(
                    torch.where(a == b, 0, a - b).norm() / b.nan_to_num(0, 0, 0).norm().clamp(min=1e-30)
                )
                if off != 0:
                    far[name] = off
        return far, quantized

    def evaluate(self, path: str, class_name: str, column: str) -> dict[str, str]:
        """One column of `eval_checks`."""
        from tests.zoo.eval_checks import check

        with captured():
            return check(path, class_name, column)

    def command(self, arguments: list[str]) -> dict[str, Any]:
        """Run one command line in this process: exit code and what it printed, in one line."""
        from loadstone.cli import main

        with captured() as read:
            try:
                main(arguments)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
        return {"code": code, "text": " ".join(read().split())[-700:]}


@contextlib.contextmanager
def captured() -> Iterator[Any]:
    """Stdout and stderr of the block, also of what wrote to them before and kept them."""
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush(), sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        text: list[str] = []
        try:
            yield lambda: text[0]
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])
            file.seek(0)
            text.append(file.read())


def main() -> None:
    stock = sys.argv[1] == "stock"
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    worker = Worker(stock)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            answer = {"error": text, "where": f"{Path(last.filename).name}:{last.lineno}"}
            if type(error).__module__.startswith("loadstone"):
                answer["refused"] = True
        if stock and "loadstone" in sys.modules:
            answer = {"error": "the stock process imported loadstone"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
