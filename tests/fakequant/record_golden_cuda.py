"""Record what NVIDIA ModelOpt 0.47's CUDA kernels make of the golden weights.

Usage, on a CUDA machine with nvcc and the ``nvidia-modelopt`` wheel unpacked on the path:
``python tests/fakequant/record_golden_cuda.py OUT``. The kernels are loaded one by one out of the wheel (ModelOpt's own
import wants packages that no kernel needs), with the arguments that ``modelopt/torch/quantization/tensor_quant.py``
gives them. A kernel that cannot be built or run is left out and named; the others are recorded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
EXTENSIONS = {
    "modelopt_cuda_ext": (["tensor_quant.cpp", "tensor_quant_gpu.cu"], []),
    "modelopt_cuda_ext_fp8": (["tensor_quant_gpu_fp8.cu"], []),
    "modelopt_cuda_ext_mx": (["tensor_quant_mx.cu"], ["--use_fast_math"]),
}


@functools.cache
def wheel() -> Path:
    """The ``modelopt/torch`` directory, nothing of it imported."""
    spec = importlib.util.find_spec("modelopt")
    assert spec is not None and spec.submodule_search_locations, "no nvidia-modelopt on the path"
    return Path(spec.submodule_search_locations[0]) / "torch"


def build(name: str) -> Any:
    """One of ModelOpt's CUDA extensions, compiled with ModelOpt's flags; reused when it was built before."""
    from torch.utils.cpp_extension import load

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    sources, flags = EXTENSIONS[name]
    folder = wheel() / "kernels" / "quantization" / "gemm"
    return load(name, [folder / source for source in sources], extra_cuda_cflags=flags)


def triton_kernel() -> Callable[..., torch.Tensor]:
    """``fp4_fake_quant_block`` of Hopper and later, its packages' ``__init__`` files passed over."""
    root = wheel()
    for name in (
        "", "torch", "torch.kernels", "torch.kernels.quantization", "torch.kernels.quantization.common",
        "torch.kernels.quantization.gemm", "torch.quantization", "torch.quantization.utils",
    ):  # fmt: skip
        whole = f"modelopt.{name}".rstrip(".")
        package = types.ModuleType(whole)
        package.__path__ = [str(root.parent.joinpath(*name.split(".")) if name else root.parent)]
        sys.modules[whole] = package
    return importlib.import_module(
        "modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper"
    ).fp4_fake_quant_block


def kernels() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name in the golden file -> what it does to a float32 CUDA weight."""
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def add(name: str, make: Callable[[], Callable[[torch.Tensor], torch.Tensor]]) -> None:
        try:
            found[name] = make()
        except Exception as error:
            print(f"{name}: left out ({type(error).__name__}: {' '.join(str(error).split())[:300]})")

    def mx(element: str) -> Callable[[torch.Tensor], torch.Tensor]:
        ext = build("modelopt_cuda_ext_mx")
        kinds = getattr(ext.Types, element), ext.Types.E8M0
        return lambda w: ext.fused_amax_convert(w, 32, *kinds, None)

    def nvfp4_triton() -> Callable[[torch.Tensor], torch.Tensor]:
        kernel = triton_kernel()
        return lambda w: kernel(w, w.abs().amax())

    def int8() -> Callable[[torch.Tensor], torch.Tensor]:
        ext = build("modelopt_cuda_ext")
        return lambda w: ext.fake_tensor_quant_with_axis(w, w.abs().amax(1), 0, 8, False, False)

    def fp8() -> Callable[[torch.Tensor], torch.Tensor]:
        ext = build("modelopt_cuda_ext_fp8")
        return lambda w: ext.fake_e4m3fy(w, w.abs().amax())

    def fp8_rows() -> Callable[[torch.Tensor], torch.Tensor]:
        ext = build("modelopt_cuda_ext_fp8")
        return lambda w: ext.fake_e4m3fy_with_axis(w, w.abs().amax(1), 0)

    add("int8", int8)
    add("fp8", fp8)
    add("fp8:granularity=row", fp8_rows)
    add("nvfp4", nvfp4_triton)
    add("mxfp8", lambda: mx("E4M3"))
    add("mxfp4", lambda: mx("E2M1"))
    return found


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The golden weights, and a wider one with rows of many sizes, which is recorded too."""
    golden = load_file(GOLDEN / f"modelopt-0.47-{str(dtype).removeprefix('torch.')}.safetensors")
    found = {name: w for name, w in golden.items() if name.startswith("weight.")}
    generator = torch.Generator().manual_seed(47)
    wide = torch.randn(16, 512, generator=generator) * torch.logspace(-6, 2, 16)[:, None]
    return found | {"weight.512": wide.to(dtype)}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="loadstone-ext-")
    # Compiled side by side, each in its own process; one that fails is left out below.
    builds = [subprocess.Popen([sys.executable, __file__, "--build", name]) for name in EXTENSIONS]
    for process in builds:
        process.wait()
    found = kernels()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        recorded: dict[str, torch.Tensor] = {}
        for key, w in weights(dtype).items():
            width = int(key.partition(".")[2])
            if width == 512:
                recorded[key] = w
            for name, kernel in found.items():
                # Partial blocks: as ModelOpt's kernels pad them, where they do.
                if ("nvfp4" in name and width % 16) or ("mxfp" in name and width % 32):
                    continue
                try:
                    folded = kernel(w.cuda().float()).to(dtype).cpu()
                except Exception as error:
                    reason = " ".join(str(error).split())[:200]
                    print(f"{name}.{width} {dtype}: left out ({type(error).__name__}: {reason})")
                    continue
                recorded[f"{name}.{width}"] = folded.contiguous().clone()
        name = f"modelopt-0.47-cuda-{str(dtype).removeprefix('torch.')}.safetensors"
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "modelopt": "0.47.0"}
        save_file(recorded, out / name, metadata=facts)
        _compare(str(dtype), recorded, weights(dtype))


def _compare(dtype: str, recorded: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    from loadstone.fakequant.formats import parse_format
    from loadstone.fakequant.formats.fold import fold

    for key, theirs in recorded.items():
        name, _, width = key.rpartition(".")
        if name == "weight":
            continue
        spec = parse_format(name).weight
        w = given[f"weight.{width}"]
        on_cpu, on_gpu = fold("w", w, spec), fold("w", w.cuda(), spec).cpu()
        differ = int((on_cpu != theirs).sum())
        print(
            f"{dtype} {key}: {differ} of {w.numel()} differ; ours on CPU == on GPU: {torch.equal(on_cpu, on_gpu)}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--build":
        build(sys.argv[2])
    else:
        main()
