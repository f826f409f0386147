"""The LoRA layer for Hopper in CUDA C++, one launch forward and one backward: csrc/cuda, through ctypes.

The library is optional (`FASTLORA_BUILD_CUDA=1 pip install ...`) and loaded when first asked for.

What a launch needs beside its results lies in one scratch tensor, and in flags: words that are zero between launches,
which every launch leaves so. Launches of one stream share them, for none begins before the last has ended; a captured
graph has its own, for it may be replayed beside anything.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
DRIVER = "libcuda.so.1"
MAX_RANK = 128
DTYPES = (torch.float16, torch.bfloat16)

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_TAIL = [(name, _int) for name in ("M", "N", "K", "R", "is_half", "adapters_float", "threshold")] + [
    ("scaling", ctypes.c_float),
    ("stream", _pointer),
]


def _call(name: str, pointers: str, strides: str) -> type[ctypes.Structure]:
    """csrc/cuda/host.cpp's struct of this name."""
    fields = [(pointer, _pointer) for pointer in pointers.split()]
    return type(
        name, (ctypes.Structure,), {"_fields_": fields + [(f"stride_{s}", _long) for s in strides.split()] + _TAIL}
    )


ForwardCall = _call(
    "ForwardCall", "x weight bias lora_A lora_B seed y S S_rows packed_A packed_B bits flags", "x w y ar ak bn br"
)
BackwardCall = _call(
    "BackwardCall",
    "dy x weight lora_A lora_B S seed dX dA dB dS_rows dS_columns S_columns packed_A packed_B bits partials flags",
    "dy x w dx ar ak bn br",
)


class Sizes(ctypes.Structure):
    """csrc/cuda/host.cpp's struct of this name."""

    _fields_ = [
        *((n, _int) for n in ("stride_s", "stride_t", "flags", "mask_rows", "mask_stride")),
        ("partials", _long),
    ]


@cache
def library() -> ctypes.CDLL:
    """The library with its driver opened. Raises RuntimeError with the reason where there is none."""
    if not LIBRARY.is_file():
        raise RuntimeError("the CUDA C++ library was not built (FASTLORA_BUILD_CUDA=1)")
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(f"the CUDA C++ library cannot be loaded ({error})") from error
    lib.fastlora_cuda_error.restype = ctypes.c_char_p
    lib.fastlora_cuda_sizes.restype = None
    lib.fastlora_cuda_predicted_us.restype = ctypes.c_double
    lib.fastlora_cuda_predicted_us.argtypes = [_int] * 7 + [ctypes.c_double]
    lib.fastlora_cuda_split.argtypes = [_int] * 6 + [ctypes.c_double]
    _check(lib, lib.fastlora_cuda_open(DRIVER.encode()))
    return lib


def _check(lib: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(f"csrc/cuda: {lib.fastlora_cuda_error(code).decode()} ({code})")


def why_not(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "CUDA C++ kernels need an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the CUDA C++ kernels are for compute capability 9.0 (Hopper)"
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None


def unsupported(problem) -> str | None:
    """Why they cannot run `problem` (its M N K R dtype adapter_dtype), or None."""
    if problem.dtype not in DTYPES:
        return f"x is {problem.dtype}; the CUDA C++ kernels take float16 and bfloat16"
    if problem.adapter_dtype not in (problem.dtype, torch.float32):
        return f"the adapters are {problem.adapter_dtype}; the CUDA C++ kernels take x's dtype and float32"
    if not 1 <= problem.R <= MAX_RANK:
        return f"R is {problem.R}; the CUDA C++ kernels take 1 to {MAX_RANK}"
    if 0 in (problem.M, problem.N, problem.K):
        return "M, N or K is 0: nothing to multiply"
    if problem.N % 8 or problem.K % 8:
        return f"N is {problem.N} and K is {problem.K}; the CUDA C++ kernels need rows of 16 bytes, multiples of 8"
    return None


def fits(matrix: Tensor) -> bool:
    """Whether TMA takes this (rows, columns) tensor as it lies: rows at multiples of 16 bytes that do not overlap."""
    rows, columns = matrix.stride()
    return columns == 1 and rows % 8 == 0 and rows >= matrix.shape[1] and matrix.data_ptr() % 16 == 0


def forward(
    x2: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float,
    seed: Tensor | None, y2: Tensor,
) -> Tensor:  # fmt: skip
    """y2 = x2 @ weight.T + bias + scaling * drop(x2) @ lora_A.T @ lora_B.T; returns S = scaling * drop(x2) @ lora_A.T.

    Args:
        x2: (M, K), float16 or bfloat16; rows at multiples of 16 bytes (`fits`), as weight (N, K) and y2 (M, N).
        bias: (N,) contiguous, x2's dtype, or None.
        lora_A, lora_B: (R, K), (N, R), x2's dtype or float32, any strides; R from 1 to 128.
        scaling: such that the kernels' own factor fits it: they divide what they keep by 1 - round(p * 65536) / 65536.
        seed: int64, one element, on x2's device; unused where dropout_p is 0.

    Returns:
        (M, R), x2's dtype, contiguous.

    Raises:
        RuntimeError: the driver's error, or what the library refuses.
    """
    (M, K), (N, R) = x2.shape, lora_B.shape
    sizes = _sizes(M, N, K, R)
    empty = torch.empty
    S = empty(M, R, dtype=x2.dtype, device=x2.device)
    scratch = {
        "S_rows": empty(M, sizes.stride_s, dtype=x2.dtype, device=x2.device) if R % 8 else None,
        "packed_A": empty(R, K, dtype=x2.dtype, device=x2.device),
        "packed_B": empty(N, sizes.stride_s, dtype=x2.dtype, device=x2.device),
        "bits": _bits(sizes, dropout_p, x2.device),
    }
    call = ForwardCall(
        stride_x=x2.stride(0), stride_w=weight.stride(0), stride_y=y2.stride(0), **_of_adapters(lora_A, lora_B),
        M=M, N=N, K=K, R=R, is_half=x2.dtype is torch.float16, threshold=round(dropout_p * 65536), scaling=scaling,
    )  # fmt: skip
    reads = {"x": x2, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "seed": seed}
    _run("forward", call, reads, {"y": y2, "S": S, **scratch}, sizes)
    return S


def backward(
    dy2: Tensor, x2: Tensor | None, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, S: Tensor, scaling: float,
    dropout_p: float, seed: Tensor | None, need_dB: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dX (M, K), dA (R, K) and dB (N, R), contiguous; dA and dB in the adapters' dtype.

    No dX where weight is None, no dA where x2 is, no dB unless `need_dB`: None, and the launch does less.

    Args:
        dy2: (M, N), x2's dtype, rows at multiples of 16 bytes (`fits`).
        x2, weight: as in `forward`, or None.
        S: (M, R), dy2's dtype, contiguous: what `forward` returned. The rest as there.

    Raises:
        RuntimeError: the driver's error, or what the library refuses.
    """
    (M, N), (R, K) = dy2.shape, lora_A.shape
    sizes = _sizes(M, N, K, R)
    empty = torch.empty
    dX = empty(M, K, dtype=dy2.dtype, device=dy2.device) if weight is not None else None
    dA = empty(R, K, dtype=lora_A.dtype, device=dy2.device) if x2 is not None else None
    dB = empty(N, R, dtype=lora_B.dtype, device=dy2.device) if need_dB else None
    scratch = {
        "dS_rows": empty(M, sizes.stride_s, dtype=dy2.dtype, device=dy2.device),
        "dS_columns": empty(R, sizes.stride_t, dtype=dy2.dtype, device=dy2.device),
        "S_columns": empty(R, sizes.stride_t, dtype=dy2.dtype, device=dy2.device),
        "packed_A": empty(R, K, dtype=dy2.dtype, device=dy2.device),
        "packed_B": empty(R, N, dtype=dy2.dtype, device=dy2.device),
        "bits": _bits(sizes, dropout_p, dy2.device),
        "partials": empty(sizes.partials, dtype=torch.float32, device=dy2.device),
    }
    call = BackwardCall(
        stride_dy=dy2.stride(0), stride_x=0 if x2 is None else x2.stride(0),
        stride_w=0 if weight is None else weight.stride(0), stride_dx=K, **_of_adapters(lora_A, lora_B), M=M, N=N, K=K,
        R=R, is_half=dy2.dtype is torch.float16, threshold=round(dropout_p * 65536), scaling=scaling,
    )  # fmt: skip
    reads = {"dy": dy2, "x": x2, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "S": S, "seed": seed}
    _run("backward", call, reads, {"dX": dX, "dA": dA, "dB": dB, **scratch}, sizes)
    return dX, dA, dB


def _sizes(M: int, N: int, K: int, R: int) -> Sizes:
    sizes = Sizes()
    library().fastlora_cuda_sizes(M, N, K, R, ctypes.byref(sizes))
    return sizes


def _bits(sizes: Sizes, dropout_p: float, device: torch.device) -> Tensor | None:
    """Room for the mask, where there is one."""
    if round(dropout_p * 65536) == 0:
        return None
    return torch.empty(sizes.mask_rows, sizes.mask_stride, dtype=torch.uint8, device=device)


def _of_adapters(lora_A: Tensor, lora_B: Tensor) -> dict[str, int]:
    (ar, ak), (bn, br) = lora_A.stride(), lora_B.stride()
    return {
        "stride_ar": ar, "stride_ak": ak, "stride_bn": bn, "stride_br": br,
        "adapters_float": lora_A.dtype is torch.float32,
    }  # fmt: skip


_flags: dict[tuple[torch.device, int], Tensor] = {}


def _zero_flags(device: torch.device, stream: int, words: int) -> Tensor:
    """At least so many words, zero once whatever runs in `stream` has ended."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(words, dtype=torch.int32, device=device)
    known = _flags.get((device, stream))
    if known is None or known.numel() < words:
        known = _flags[device, stream] = torch.zeros(max(words, 4096), dtype=torch.int32, device=device)
    return known


def _run(name: str, call, reads: dict[str, Tensor | None], writes: dict[str, Tensor | None], sizes: Sizes) -> None:
    device = reads["lora_A"].device
    call.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    reads["flags"] = _zero_flags(device, call.stream or 0, sizes.flags)
    _launch(name, call, reads, writes)


def _launch(name: str, call, reads: dict[str, Tensor | None], writes: dict[str, Tensor | None]) -> None:
    for field, tensor in {**reads, **writes}.items():
        setattr(call, field, None if tensor is None else tensor.data_ptr())
    lib = library()
    with torch.cuda.device(reads["lora_A"].device):
        _check(lib, getattr(lib, f"fastlora_cuda_{name}")(ctypes.byref(call)))
