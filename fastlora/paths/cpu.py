"""Path `cpu`: ATen's GEMM with the frozen weight, and all that has the rank in it in kernels compiled from `csrc/`.

Forward:   Y = X Wᵀ + bias (ATen);  then S = drop(X)·Aᵀ and Y += s·S·Bᵀ, block by block, with one read of X.
Backward:  dS = s·dY·B, dBᵀ = s·Sᵀ·dY, dA = dSᵀ·drop(X) and dX = drop'(dS·A), block by block, with one read of dY and
           one of X;  then dX += dY·W (ATen).

In forward the GEMM comes first, so that a new layer, whose B is zero, gives its base's output to the bit. In backward
it comes last, because it can add to what it writes, which the kernels would have to read again; but not in bfloat16,
where oneDNN adds at a greater cost than they do.

The dropout mask is a hash of the seed and of an element's place, made where it is needed. The kernels use torch's own
threads, and the fastest instruction set that the processor has. Where they were not compiled, path `torch` runs.

Ordinary calls take the same kernels by way of the autograd node in C++ (csrc/node.cpp), without Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fastlora.paths.bank import Bank
from fastlora.paths.path import Path
from fastlora.paths.problem import Problem, Update, base_product, check_saved, rows

try:
    from fastlora import _cpu
except ImportError:
    _cpu = None

_MISSING = (
    f"its kernels are not in {pathlib.Path(__file__).parents[1]}: they were not compiled at install, or only for an "
    "installed copy (`pip install -e .` compiles them for a checkout)"
)
MAX_RANK = 0 if _cpu is None else _cpu.MAX_RANK
MEASURED = ("avx512bf16", "avx512", "avx2")  # instruction sets on which these kernels were timed against ATen's
FAST_RANK = 32  # above it ATen's GEMMs make up for the passes that they take, where nothing is dropped
_NEXT = 0x5851F42D4C957  # between the seeds of a bank's adapters
_CODES = {torch.float32: 0, torch.bfloat16: 1}
# Sizes that several threads share, rows too long for a whole block, and each mixture of dtypes.
CASES = (
    *((131, 200, 300, 16, 0.25, dtype, dtype) for dtype in (torch.float32, torch.bfloat16)),
    (61, 40, 9000, 5, 0.0, torch.float32, torch.float32),
    (40, 50, 60, 8, 0.25, torch.bfloat16, torch.float32),
    (40, 50, 60, 8, 0.25, torch.float32, torch.bfloat16),
)


def why_not(device: torch.device, problem: Problem | None) -> str | None:
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type!r}"
    missing = _MISSING if _cpu is None else _borrow_threads()
    if missing or problem is None:
        return missing
    if problem.dtype not in _CODES:
        return f"x is {problem.dtype}; the CPU kernels take float32 and bfloat16"
    if problem.adapter_dtype not in _CODES:
        return f"the adapters are {problem.adapter_dtype}; the CPU kernels take float32 and bfloat16"
    if problem.R > MAX_RANK and not problem.bank:  # where each adapter runs by itself
        return f"R is {problem.R}; the CPU kernels take at most {MAX_RANK}"
    return None


def why_slow(problem: Problem) -> str | None:
    if _cpu.instructions()[0] not in MEASURED:
        return f"it has not been measured on instruction set {_cpu.instructions()[0]!r}"
    if problem.R > FAST_RANK and not problem.dropout and not problem.bank:
        return f"'torch' measured faster on a CPU for R above {FAST_RANK} without dropout"
    return None


def kernels() -> object | None:
    """The compiled kernels as the node in C++ takes them, or None where there are none."""
    return None if _cpu is None else _cpu.kernels()


@cache
def _borrow_threads() -> str | None:
    """Hand torch's OpenMP pool to the kernels: a second one would fight the first for the cores."""
    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel  # found in what libtorch_cpu itself is linked with
    except (OSError, AttributeError) as error:
        return f"torch's OpenMP threads were not found ({error})"
    _cpu.use_threads_of(ctypes.cast(function, ctypes.c_void_p).value)
    return None


def fingerprint() -> str:
    """These kernels, with the instruction set that this processor has."""
    return f"{_cpu.instructions()[0]} {hashlib.sha256(pathlib.Path(_cpu.__file__).read_bytes()).hexdigest()}"


def forward(x, weight, bias, update) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = update.lora_A, update.lora_B
    if not (weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and (bias is None or bias.is_cpu)):
        _refuse_devices(weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    x2, y = _dense_rows(rows(x)), base_product(x, weight, bias)
    return y, (_add_update if update.bank is None else _add_bank)(y.view(x2.shape[0], weight.shape[0]), x2, update)


def _add_update(y: Tensor, x: Tensor, update: Update) -> Tensor:
    """y (M, N), dense, += the update of x (M, K); returns S."""
    lora_A, lora_B, scaling, p, seed, _ = update
    lora_A, lora_B = _dense(lora_A), _dense(lora_B)
    (M, K), (N, R) = x.shape, lora_B.shape
    S = x.new_empty((M, R))
    _cpu.forward(
        y.data_ptr(), _CODES[x.dtype], _CODES[lora_A.dtype], x.data_ptr(), x.stride(0), lora_A.data_ptr(),
        lora_B.data_ptr(), S.data_ptr(), M, N, K, R, scaling, p, _address(seed), torch.get_num_threads(),
    )  # fmt: skip
    return S


def backward(dy, x, weight, S, update, need_B):
    check_saved(dy, x, weight, S, update)
    dy, lora_A, lora_B = _dense_rows(dy), update.lora_A, update.lora_B
    x = None if x is None else _dense_rows(rows(x))
    add = dy.dtype is torch.bfloat16  # the kernels add to ATen's product; else ATen adds to what they wrote
    shape = dy.shape[0], lora_A.shape[1]
    dx = None if weight is None else torch.mm(dy, weight) if add else dy.new_empty(shape)
    dA, dB = None if x is None else _like(lora_A), _like(lora_B) if need_B else None
    (_gradients if update.bank is None else _gradients_of_bank)(dy, x, S, update, dx, dA, dB)
    if dx is not None and not add:
        dx.addmm_(dy, weight)
    return dx, dA, dB


def _gradients(dy: Tensor, x: Tensor | None, S: Tensor, update: Update, dx, dA, dB) -> None:
    """What the rank gives to dx (M, K), written or, in bfloat16, added; and dA (R, K), dB (N, R), dense."""
    lora_A, lora_B, scaling, p, seed, _ = update
    S, lora_A, lora_B = _dense(S), _dense(lora_A), _dense(lora_B)
    (M, N), (R, K) = dy.shape, lora_A.shape
    _cpu.backward(
        _address(dx), dy.dtype is torch.bfloat16, _CODES[dy.dtype], _CODES[lora_A.dtype], dy.data_ptr(), dy.stride(0),
        _address(x), 0 if x is None else x.stride(0), lora_A.data_ptr(), lora_B.data_ptr(), S.data_ptr(), _address(dA),
        _address(dB), M, N, K, R, scaling, p, _address(seed), torch.get_num_threads(),
    )  # fmt: skip


def _add_bank(y: Tensor, x: Tensor, update: Update) -> Tensor:
    """`_add_update` of several adapters, each with its own rows alone."""
    order, S = update.bank.order, x.new_zeros((x.shape[0], update.lora_A.shape[0]))
    if order is not None:
        mine = y[order]
        S[order] = _add_bank(mine, x[order], update._replace(bank=update.bank.grouped))
        y[order] = mine
        return S
    for at, ranks, alone in _each(update):
        S[at, ranks] = _add_update(y[at], x[at], alone)
    return S


def _gradients_of_bank(dy: Tensor, x: Tensor | None, S: Tensor, update: Update, dx, dA, dB) -> None:
    bank, order = update.bank, update.bank.order
    if order is not None:
        mine = None if dx is None else dx[order]
        alone = update._replace(bank=bank.grouped)
        _gradients_of_bank(dy[order], None if x is None else x[order], S[order], alone, mine, dA, dB)
        if dx is not None:
            dx[order] = mine
        return
    if len(bank.runs) < len(bank.ranks):  # some adapter has no row
        for gradient in (dA, dB):
            gradient is None or gradient.zero_()
    if dx is not None and dy.dtype is not torch.bfloat16 and sum(b - a for a, b, _ in bank.runs) < bank.M:
        dx.zero_()
    for (at, ranks, alone), (*_, adapter) in zip(_each(update), bank.runs, strict=True):
        own_A, own_B = (None if t is None else _like(t) for t in (alone.lora_A, alone.lora_B))
        _gradients(
            dy[at], None if x is None else x[at], S[at, ranks], alone, None if dx is None else dx[at],
            None if dA is None else own_A, None if dB is None else own_B,
        )  # fmt: skip
        if dA is not None:
            torch.mul(own_A, bank.scalings[adapter], out=dA[ranks])
        if dB is not None:
            dB[:, ranks] = own_B


def _each(update: Update) -> Iterator[tuple[slice, slice, Update]]:
    """Of each run: its rows, its ranks, and its adapter alone, whose scaling is in lora_A, so that S holds it."""
    bank = update.bank
    for start, stop, i in bank.runs:
        ranks, seed = slice(bank.starts[i], bank.starts[i] + bank.ranks[i]), update.seed
        own = update.lora_A[ranks] * bank.scalings[i], update.lora_B[:, ranks]
        yield slice(start, stop), ranks, Update(*own, 1.0, bank.ps[i], None if seed is None else seed + i * _NEXT)


def s_factor(scaling: float, p: float, device: torch.device) -> float:
    """S holds dropout's factor, but not the scaling."""
    return scaling


def mask(seed: Tensor, M: int, K: int, p: float | Bank) -> Tensor:
    if isinstance(p, Bank):
        found = torch.ones((M, K), dtype=torch.bool, device="cpu")
        for start, stop, i in (p if p.order is None else p.grouped).runs:
            found[start:stop] = mask(seed + i * _NEXT, stop - start, K, p.ps[i])
        if p.order is not None:
            found[p.order] = found.clone()
        return found
    factors = torch.empty((M, K), dtype=torch.float32, device="cpu")
    _cpu.mask(factors.data_ptr(), M, K, p, seed.data_ptr())
    return factors != 0


def _refuse_devices(**tensors: Tensor | None) -> None:
    """What ATen would say, said before the kernels read an address that is not theirs."""
    for name, t in tensors.items():
        if t is not None and not t.is_cpu:
            raise RuntimeError(f"{name} is on {t.device} and x on cpu; they need one device")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _dense(t: Tensor) -> Tensor:
    """t with dense memory that holds its numbers: neither negated nor zero by declaration."""
    if t.is_neg():
        t = t.resolve_neg()
    return t.clone() if t._is_zerotensor() else t.contiguous()


def _dense_rows(t: Tensor) -> Tensor:
    """t (M, K) with the elements of a row side by side; a row may lie anywhere."""
    return t if t.stride(1) == 1 and not t.is_neg() and not t._is_zerotensor() else _dense(t)


PATH = Path("cpu", why_not, forward, backward, mask, s_factor, CASES, fingerprint, why_slow)
