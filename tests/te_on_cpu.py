"""Transformer Engine's own Python modules on a CPU, for tests: what is real, what stands in, and what it proves.

Real: all of Transformer Engine's Python (autograd functions, tensor parallelism, attention without fusion) and
Megatron's wrappers of it. Standing in: its compiled extension, of which the few functions that these models reach are
written here in plain torch; every other one raises, so that nothing passes silently. Not proved: kernels, fused
attention, FP8, speed.

``install`` must come before Megatron is imported, in a process of its own: it makes torch claim a CUDA device.
The sources are those of the wheel ``transformer-engine`` (no compiled code), in a folder of their own beside the
environment: installed into it they would break ``import megatron.core`` (make puts them there).
"""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

FOLDER_VARIABLE = "GATESWEEP_TE_SOURCES"


def sources() -> Path | None:
    """The folder with the wheel's content, where make puts it; None: there is none.

    One that the environment names must be there (``make test`` names it): the tests then fail and are not skipped.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    folder = Path(sys.prefix) / "transformer-engine"
    return folder if (folder / "transformer_engine" / "pytorch").is_dir() else None


def install() -> None:
    """Make ``import transformer_engine`` work on this machine; Megatron then takes it for installed."""
    folder = sources()
    assert folder is not None, f"no Transformer Engine sources: run make, or set {FOLDER_VARIABLE}"
    assert "megatron.core" not in sys.modules, "Megatron has looked for Transformer Engine already"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its libraries are not loaded
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, str(folder))
    _pretend_cuda()
    sys.modules["transformer_engine_torch"] = _extension(folder)
    for name in ("onnx", "onnxscript", "einops"):  # for export to ONNX and for inference, which are not under test
        sys.modules.setdefault(name, MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None)))
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    # Imported by itself first: the package's own import would go on to the missing library at once.
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    import transformer_engine.pytorch  # noqa: F401

    # All kernels: without them Megatron takes torch's optimizer, as it does where there is no Transformer Engine.
    sys.modules["transformer_engine.pytorch.optimizers"] = None  # type: ignore[assignment]
    _unfused_attention()
    _plain_gates()


# -- torch claims a device ------------------------------------------------------------------------------------


def _pretend_cuda() -> None:
    """A Hopper that is a CPU. Where a tensor is made on "cuda", ``models.device.on`` sends it to the CPU."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=1, total_memory=1 << 33, name="stand-in", L2_cache_size=1 << 20
    )
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: "cpu"
    cuda.get_device_properties = lambda *_: properties
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: properties.name
    cuda.synchronize = lambda *_: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = cuda.Stream = lambda *_, **__: MagicMock(cuda_stream=0)
    cuda.stream = lambda *_: contextlib.nullcontext()
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *_: None)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]


def _unfused_attention() -> None:
    """Of Transformer Engine's three attentions the one without a kernel."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    def choose(_: object) -> None:
        os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="0", NVTE_UNFUSED_ATTN="1")

    LanguageModule._set_attention_backend = choose


def _plain_gates() -> None:
    """The fused gate is a kernel too: tensors that claim to be on CUDA would be sent to it."""
    from models import device
    from models.kernels import fused_gate

    fused_gate.available = lambda: False
    # Unlike Megatron's layers, Transformer Engine's ask for "cuda" by name in a forward pass.
    device.as_it_is = contextlib.nullcontext


# -- the compiled extension -----------------------------------------------------------------------------------

_DTYPES = {
    "kByte": torch.uint8,
    "kInt32": torch.int32,
    "kFloat32": torch.float32,
    "kFloat16": torch.float16,
    "kBFloat16": torch.bfloat16,
    "kFloat8E4M3": torch.float8_e4m3fn,
    "kFloat8E5M2": torch.float8_e5m2,
    "kFloat4E2M1": None,
}
_ENUMS = (
    "FP8FwdTensors", "FP8BwdTensors", "CommOverlapType", "NVTE_QKV_Layout", "NVTE_QKV_Format", "NVTE_Bias_Type",
    "NVTE_Mask_Type", "NVTE_Softmax_Type", "NVTE_Fused_Attn_Backend", "NVTEScalingMode", "NVTERoutingMapFormat",
    "NVTEQBHistogramMode", "Float8BlockScaleTensorFormat",
)  # fmt: skip


class _Extension(types.ModuleType):
    """What is not written below exists, so that it can be imported by name, and raises when it is called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def needs_a_gpu(*_: object, **__: object) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name} needs a GPU: it has no stand-in")

        return needs_a_gpu


def _extension(folder: Path) -> types.ModuleType:
    """The stand-in. Its enums have the members that the sources name; their numbers are ours."""
    module = _Extension("transformer_engine_torch")
    text = "".join(path.read_text() for path in sorted((folder / "transformer_engine" / "pytorch").rglob("*.py")))
    module.DType = enum.IntEnum("DType", list(_DTYPES), start=0)
    for name in _ENUMS:
        members = sorted(set(re.findall(name.removeprefix("NVTE") + r"\.([A-Za-z]\w*)", text)))
        setattr(module, name, enum.IntEnum(name, members, start=0))
    for function in (generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd):
        setattr(module, function.__name__, function)
    module.get_num_cublas_streams = lambda: 1
    module.get_cudnn_version = lambda: 91400
    module.get_cublasLt_version = lambda: 130100
    for name in ("layernorm_fwd", "layernorm_bwd"):  # looked up in one table with RMSNorm's
        setattr(module, name, getattr(module, name))
    return module


def _torch_dtype(dtype: object) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = _DTYPES[dtype.name]  # type: ignore[attr-defined]
    assert found is not None
    return found


def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any, dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, size: int,
    accumulate: bool, split: bool, **options: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """op(B) @ op(A), row-major: the extension's matrices are column-major, as cuBLAS has them."""
    assert quantizer is None
    assert not gelu
    assert bias is None or bias.numel() == 0
    a, b = A.flatten(0, -2), B.flatten(0, -2)
    product = (b.T if transb else b) @ (a.T if transa else a)
    product = product.to(A.dtype if dtype is None else _torch_dtype(dtype))
    if not transb:
        product = product.view(*B.shape[:-1], product.shape[-1])
    if out is None:
        return product, None, None, None
    return (out.add_(product) if accumulate else out.copy_(product)), None, None, None


def te_general_grouped_gemm(
    A: list[Tensor], transa: bool, B: list[Tensor], transb: bool, out: list[Tensor], dtype: Any, m_splits: list[int],
    bias: Any, bias_dtype: Any, single_output: bool, gelu: Any, grad: bool, workspaces: Any, size: int,
    accumulate: bool, split: bool, sm_count: int,
) -> list[Tensor]:  # fmt: skip
    """One product an expert, written into ``out``: a tensor each, or one that holds all, an expert after the other."""
    outputs = out[0].split(m_splits) if single_output else out
    for a, b, target in zip(A, B, outputs, strict=True):
        generic_gemm(
            a, transa, b, transb, target, None, dtype, None, None, False, None, grad, None, 0, accumulate, split
        )
    return bias


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any, margin: int, zero: bool
) -> tuple[Tensor, None, Tensor]:
    """(normed, no mean, 1 / rms a row); computed in fp32, as the kernel does."""
    assert quantizer is None
    assert not zero
    wide = x.float()
    rsigma = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    normed = (wide * rsigma[:, None] * weight.float()).to(_torch_dtype(dtype))
    return (normed if out is None else out.copy_(normed)), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    normed, scaled = x.float() * rsigma[:, None], dy.float() * weight.float()
    dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(dim=0).to(weight.dtype)
