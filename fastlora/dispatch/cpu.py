"""Path `cpu`: ATen's GEMM with the frozen weight, and all that has the rank in it in kernels compiled from `csrc/`.

Forward:   Y = X Wᵀ + bias (ATen);  then S = drop(X)·Aᵀ and Y += s·S·Bᵀ, block by block, with one read of X.
Backward:  dS = s·dY·B, dBᵀ = s·Sᵀ·dY, dA = dSᵀ·drop(X) and dX = drop'(dS·A), block by block, with one read of dY and
           one of X;  then dX += dY·W (ATen).

In forward the GEMM comes first, so that a new layer, whose B is zero, gives its base's output to the bit. In backward
it comes last, because it can add to what it writes, which the kernels would have to read again; but not in bfloat16,
where oneDNN adds at a greater cost than they do.

The dropout mask is a hash of the seed and of an element's place, made where it is needed. The kernels use torch's own
threads, and the fastest instruction set that the processor has. Where they were not compiled, path `torch` runs.

`NODE` is the same path as an autograd node in C++ (csrc/cpu_node.cpp), compiled for one version of torch: ordinary
calls take it and save most of Python's time; it shares the kernels and the seeds of what is here.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.dispatch.problem import Problem, check_saved, rows
from fastlora.dispatch.torch import draw_seed

try:
    from fastlora import _cpu
except ImportError:
    _cpu, _missing = None, (
        f"its kernels are not in {Path(__file__).parents[1]}: they were not compiled at install, or only for an "
        "installed copy (`pip install -e .` compiles them for a checkout)"
    )

NAME = "cpu"
MAX_RANK = 0 if _cpu is None else _cpu.MAX_RANK
MEASURED = ("avx512bf16", "avx512", "avx2")  # instruction sets
_CODES = {torch.float32: 0, torch.bfloat16: 1}
# What the self-check adds to its own cases, as (M, N, K, R, dropout_p, dtype, adapter_dtype): sizes that several
# threads share, rows too long for a whole block, and each mixture of dtypes.
CASES = (
    *((131, 200, 300, 16, 0.25, dtype, dtype) for dtype in (torch.float32, torch.bfloat16)),
    (61, 40, 9000, 5, 0.0, torch.float32, torch.float32),
    (40, 50, 60, 8, 0.25, torch.bfloat16, torch.float32),
    (40, 50, 60, 8, 0.25, torch.float32, torch.bfloat16),
)


def _load_node() -> ModuleType | None:
    """What was compiled for this very version of torch, or None: another version's would not even load safely."""
    try:
        return importlib.import_module("fastlora._cpu_node_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


NODE = None if _cpu is None else _load_node()


def kernels() -> object:
    """The compiled kernels as `NODE` takes them."""
    return _cpu.kernels()


def node_key(dtype: torch.dtype, adapter_dtype: torch.dtype, R: int, dropout: bool) -> int | None:
    """What `NODE` looks up in `registry.selected` to know whether this path runs; None for dtypes that are not ours."""
    if dtype not in _CODES or adapter_dtype not in _CODES:
        return None
    return ((R * 2 + dropout) * 2 + _CODES[dtype]) * 2 + _CODES[adapter_dtype]


@cache
def unavailable(device: torch.device) -> str | None:
    """Why this path cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type!r}"
    return _missing if _cpu is None else _borrow_threads()


def _borrow_threads() -> str | None:
    """Hand torch's OpenMP pool to the kernels: a second one would fight the first for the cores."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel  # found in what libtorch_cpu itself is linked with
    except (OSError, AttributeError) as error:
        return f"torch's OpenMP threads were not found ({error})"
    _cpu.use_threads_of(ctypes.cast(function, ctypes.c_void_p).value)
    return None


def unmeasured() -> str | None:
    """The instruction set that would run, where nobody has measured these kernels against ATen's; else None."""
    return None if _cpu.instructions()[0] in MEASURED else f"instruction set {_cpu.instructions()[0]!r}"


def compiled() -> str:
    """What a self-check's verdict holds for: these kernels, with the instruction set that this processor has."""
    return f"{_cpu.instructions()[0]} {hashlib.sha256(Path(_cpu.__file__).read_bytes()).hexdigest()}"


def unsupported(problem: Problem) -> str | None:
    """Why the kernels cannot run `problem`, or None."""
    if problem.dtype not in _CODES:
        return f"x is {problem.dtype}; the CPU kernels take float32 and bfloat16"
    if problem.adapter_dtype not in _CODES:
        return f"the adapters are {problem.adapter_dtype}; the CPU kernels take float32 and bfloat16"
    if problem.R > MAX_RANK:
        return f"R is {problem.R}; the CPU kernels take at most {MAX_RANK}"
    return None


def draw(x: Tensor, dropout_p: float) -> Tensor:
    """A dropout seed, int64 and of one element, drawn by torch's generator."""
    return draw_seed(x.device)


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """x (..., K) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype."""
    if not (weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and (bias is None or bias.is_cpu)):
        _refuse_devices(weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    x2, lora_A, lora_B = _dense_rows(rows(x)), _packable(lora_A), _packable(lora_B)
    (M, K), (N, R) = x2.shape, lora_B.shape
    S = x.new_empty((M, R))
    # Said before the product, which leaves all of Python out of the caches.
    arguments = (
        _CODES[x.dtype], _CODES[lora_A.dtype], x2.data_ptr(), x2.stride(0), lora_A.data_ptr(), lora_B.data_ptr(),
        S.data_ptr(), M, N, K, R, scaling, dropout_p, 0 if seed is None else seed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if x.dim() == 2:
        y = F.linear(x, weight, bias)
    else:  # F.linear would return a view here, on which autograd forbids in-place operations
        y = x.new_empty((*x.shape[:-1], N))
        if bias is None:
            torch.mm(x2, weight.t(), out=y.view(M, N))
        else:
            torch.addmm(bias, x2, weight.t(), out=y.view(M, N))
    _cpu.forward(y.data_ptr(), *arguments)
    return y, S


def backward(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, need_B):
    """dy (M, N) -> dx (M, K), dA (R, K), dB (N, R).

    None for dx when weight is None, for dA when x is None, for dB unless `need_B`.
    """
    check_saved(dy, x, weight, S, lora_A, lora_B, seed)
    dy, S, lora_A, lora_B = _dense_rows(dy), _packable(S), _packable(lora_A), _packable(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    dx = dA = dB = None
    at_x = at_dx = at_dA = at_dB = x_stride = 0
    add = dy.dtype is torch.bfloat16  # the kernels add to ATen's product; else ATen adds to what they wrote
    if x is not None:
        x = _dense_rows(rows(x))
        dA = torch.empty_like(lora_A)
        at_x, x_stride, at_dA = x.data_ptr(), x.stride(0), dA.data_ptr()
    if need_B:
        dB = torch.empty_like(lora_B)
        at_dB = dB.data_ptr()
    arguments = (
        _CODES[dy.dtype], _CODES[lora_A.dtype], dy.data_ptr(), dy.stride(0), at_x, x_stride, lora_A.data_ptr(),
        lora_B.data_ptr(), S.data_ptr(), at_dA, at_dB, M, N, K, R, scaling, dropout_p,
        0 if seed is None else seed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if weight is not None:
        dx = torch.mm(dy, weight) if add else dy.new_empty((M, K))
        at_dx = dx.data_ptr()
    _cpu.backward(at_dx, add, *arguments)
    if dx is not None and not add:
        dx.addmm_(dy, weight)
    return dx, dA, dB


def s_factor(scaling: float, dropout_p: float) -> float:
    """What dYᵀ·S is to be multiplied by to be dB: S holds dropout's factor, but not the scaling."""
    return scaling


def mask(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """The dropout mask (M, K), bool, True = kept, that `seed` from `draw` stands for."""
    factors = torch.empty((M, K), dtype=torch.float32, device="cpu")
    _cpu.mask(factors.data_ptr(), M, K, dropout_p, seed.data_ptr())
    return factors != 0


def _refuse_devices(**tensors: Tensor | None) -> None:
    """What ATen would say, said before the kernels read an address that is not theirs."""
    for name, t in tensors.items():
        if t is not None and not t.is_cpu:
            raise RuntimeError(f"{name} is on {t.device} and x on cpu; they need one device")


def _readable(t: Tensor) -> Tensor:
    """t with memory that holds its numbers: neither negated nor zero by declaration."""
    if t.is_neg():
        t = t.resolve_neg()
    return t.clone() if t._is_zerotensor() else t


def _packable(t: Tensor) -> Tensor:
    """As the kernels read what has the rank in it: dense."""
    return _readable(t).contiguous()


def _dense_rows(t: Tensor) -> Tensor:
    """t (M, K) with the elements of a row side by side; a row may lie anywhere."""
    t = _readable(t)
    return t if t.stride(1) == 1 else t.contiguous()
