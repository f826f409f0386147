"""What the two Triton paths share: where they can run, what they take, and their backward."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from fastlora import env
from fastlora.dispatch.problem import Problem, check_saved, rows

MAX_RANK = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken Triton raises more than ImportError
        return f"triton cannot be imported ({error})"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None."""
    missing = _triton_missing()
    if missing:
        return missing
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
            return "the GPU is older than compute capability 7.5"
        return None
    if device.type == "cpu":
        return None if env.interpreting() else "tensors on the CPU need TRITON_INTERPRET=1"
    return f"no Triton kernels for device type {device.type!r}"


def unsupported(problem: Problem) -> str | None:
    """Why Triton kernels cannot run `problem`, or None."""
    if problem.dtype not in _DTYPES:
        return f"x is {problem.dtype}; the kernels take float16, bfloat16 and float32"
    if problem.adapter_dtype not in (problem.dtype, torch.float32):
        return f"the adapters are {problem.adapter_dtype}; the kernels take x's dtype and float32"
    if problem.R > MAX_RANK:
        return f"R is {problem.R}; the kernels take at most {MAX_RANK}"
    if problem.empty:
        return "M, N or K is 0: nothing to multiply"
    if problem.device.type == "cpu" and problem.dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    return None


def draw(x: Tensor, dropout_p: float) -> Tensor:
    """A dropout seed, int64 and of one element, drawn by torch's generator of x's device and left there."""
    return torch.empty((), dtype=torch.int64, device=x.device).random_()


def dropout_of(dropout_p: float, seed: Tensor | None):
    """The kernels' `Dropout`, or None when nothing is dropped."""
    from fastlora.kernels.dropout import Dropout

    return Dropout(dropout_p, seed) if dropout_p > 0.0 else None


def exact(scaling: float, dropout_p: float) -> float:
    """The scaling to hand to kernels, which divide what they keep by 1 - round(p·65536)/65536, so that it is 1 - p."""
    if dropout_p in (0.0, 1.0):
        return scaling
    return scaling * (1.0 - round(dropout_p * 65536) / 65536) / (1.0 - dropout_p)


def on_device_of(x: Tensor):
    """A context in which x's GPU is the current one: Triton launches there, wherever its arguments lie."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def mask(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """The dropout mask (M, K), bool, True = kept, that `seed` from `draw` stands for."""
    from fastlora.kernels.dropout import Dropout, keep_mask

    return keep_mask(Dropout(dropout_p, seed), M, K)


def s_factor(scaling: float, dropout_p: float) -> float:
    """What dYᵀ·S is to be multiplied by to be dB: S holds every factor."""
    return 1.0


def backward(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, need_B):
    """dy (M, N) -> dx (M, K), dA (R, K), dB (N, R).

    None for dx when weight is None and for dA when x is None; dB comes with dS from one read of dy in any case.
    """
    from fastlora.kernels import gemm, grads

    check_saved(dy, x, weight, S, lora_A, lora_B, seed)
    dropout = dropout_of(dropout_p, seed)
    with on_device_of(dy):
        dS, dB = grads.ds_db(dy, lora_B, S, exact(scaling, dropout_p))
        dA = None if x is None else grads.da(dS, rows(x), dropout, lora_A.dtype)
        dx = None if weight is None else gemm.gemm_dx(dy, weight, dS, lora_A, dropout)
    return dx, dA, dB
