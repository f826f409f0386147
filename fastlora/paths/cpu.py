"""Path `cpu`: ATen's GEMM with the frozen weight, and all that has the rank in it in kernels compiled from `csrc/`.

Forward:   Y = X Wᵀ + bias (ATen);  then S = drop(X)·Aᵀ and Y += s·S·Bᵀ, block by block, with one read of X.
Backward:  dS = s·dY·B, dBᵀ = s·Sᵀ·dY, dA = dSᵀ·drop(X) and dX = drop'(dS·A), block by block, with one read of dY and
           one of X;  then dX += dY·W (ATen).

In forward the GEMM comes first, so that a new layer, whose B is zero, gives its base's output to the bit. In backward
it comes last, because it can add to what it writes, which the kernels would have to read again; but not in 16 bits,
where oneDNN adds at a greater cost than they do.

The dropout mask is a hash of the seed and of an element's place, made where it is needed. The kernels use torch's own
threads, and the fastest instruction set that the processor has. Where they were not compiled, path `torch` runs.

Ordinary calls take the same kernels by way of the autograd node in C++ (csrc/node.cpp), without Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
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
# Above these ranks ATen's GEMMs make up for the passes that they take, where nothing is dropped. In float16 only on
# processors with instructions for it: elsewhere its products take 40 times as long.
_has_float16 = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)()
FAST_RANKS = {torch.float32: 32, torch.bfloat16: 32, torch.float16: 64 if _has_float16 else MAX_RANK}
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Sizes that several threads share, rows too long for a whole block, and each mixture of dtypes.
CASES = (
    *((131, 200, 300, 16, 0.25, dtype, dtype) for dtype in _CODES),
    (61, 40, 9000, 5, 0.0, torch.float32, torch.float32),
    (40, 50, 60, 8, 0.25, torch.bfloat16, torch.float32),
    (40, 50, 60, 8, 0.25, torch.float32, torch.bfloat16),
    (40, 50, 60, 8, 0.25, torch.float16, torch.float32),
    (40, 50, 60, 8, 0.25, torch.float32, torch.float16),
)


def why_not(device: torch.device, problem: Problem | None) -> str | None:
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type!r}"
    missing = _MISSING if _cpu is None else _borrow_threads()
    if missing or problem is None:
        return missing
    if problem.dtype not in _CODES:
        return f"x is {problem.dtype}; the CPU kernels take float32, bfloat16 and float16"
    if problem.adapter_dtype not in _CODES:
        return f"the adapters are {problem.adapter_dtype}; the CPU kernels take float32, bfloat16 and float16"
    if (problem.bank or problem.R) > MAX_RANK:  # each adapter of a bank runs by itself
        return f"R is {problem.R}; the CPU kernels take at most {MAX_RANK}"
    return None


def why_slow(problem: Problem) -> str | None:
    if _cpu.instructions()[0] not in MEASURED:
        return f"it has not been measured on instruction set {_cpu.instructions()[0]!r}"
    fast = FAST_RANKS[problem.dtype]
    if fast < problem.R and not problem.dropout and not problem.bank:
        return f"'torch' measured faster on a CPU for R above {fast} without dropout"
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
    lora_A, lora_B, bank = update.lora_A, update.lora_B, update.bank
    if not (weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and (bias is None or bias.is_cpu)):
        _refuse_devices(weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    x2, y = _dense_rows(rows(x)), base_product(x, weight, bias)
    y2 = y.view(x2.shape[0], weight.shape[0])
    S = (x.new_empty if bank is None else x.new_zeros)((x2.shape[0], lora_A.shape[0]))
    order = None if bank is None else bank.order
    if order is None:
        _forward(y2, x2, S, update)
    else:  # each adapter's rows are brought together
        mine, kept = y2[order], S.clone()
        _forward(mine, x2[order], kept, update)
        y2[order], S[order] = mine, kept
    return y, S


def _forward(y: Tensor, x: Tensor, S: Tensor, update: Update) -> None:
    """y (M, N) += the update of x (M, K), and S (M, R); y and S dense."""
    lora_A, lora_B, _, parts = _parts(update, x.shape[0])
    K, (N, R), size, wide = x.shape[1], lora_B.shape, x.element_size(), lora_A.element_size()
    for row, count, rank, r, scaling, p, seed in parts:
        _cpu.forward(
            y.data_ptr() + row * N * size, _CODES[x.dtype], _CODES[lora_A.dtype],
            x.data_ptr() + row * x.stride(0) * size, x.stride(0), lora_A.data_ptr() + rank * K * wide,
            lora_B.data_ptr() + rank * wide, S.data_ptr() + (row * R + rank) * size, count, N, K, r, R, scaling, p,
            seed, torch.get_num_threads(),
        )  # fmt: skip


def backward(dy, x, weight, S, update, need_B, onto=None):
    """Gradients; dx is added to `onto` (M, K), where that is given."""
    check_saved(dy, x, weight, S, update)
    dy, S, lora_A, lora_B, bank = _dense_rows(dy), _dense(S), update.lora_A, update.lora_B, update.bank
    x = None if x is None else _dense_rows(rows(x))
    add = dy.dtype is not torch.float32  # the kernels add to ATen's product; else ATen adds to what they wrote
    new = torch.empty if bank is None else torch.zeros  # an adapter, or a row, may have no part in it
    shape = dy.shape[0], lora_A.shape[1]
    if onto is not None:
        dx = onto
    else:
        dx = None if weight is None else torch.mm(dy, weight) if add else new(shape, dtype=dy.dtype)
    dA = None if x is None else new(lora_A.shape, dtype=lora_A.dtype)
    dB = new(lora_B.shape, dtype=lora_B.dtype) if need_B else None
    order = None if bank is None else bank.order
    if order is None:
        _backward(dx, dy, x, S, dA, dB, update, add or onto is not None)
    else:
        mine = None if dx is None else dx[order]
        _backward(mine, dy[order], None if x is None else x[order], S[order], dA, dB, update, add)
        if dx is not None:
            dx[order] = mine
    if bank is not None and dA is not None:
        dA *= bank.column
    if dx is not None and (onto is not None or not add):
        dx.addmm_(dy, weight)
    return dx, dA, dB


def _backward(dx: Tensor | None, dy: Tensor, x: Tensor | None, S: Tensor, dA, dB, update, add) -> None:
    """dA (R, K) and dB (N, R), and what the rank gives to dx (M, K): written or added."""
    lora_A, lora_B, _, parts = _parts(update, dy.shape[0])
    K, (N, R), size, wide = lora_A.shape[1], lora_B.shape, dy.element_size(), lora_A.element_size()
    stride = 0 if x is None else x.stride(0)
    for row, count, rank, r, scaling, p, seed in parts:
        _cpu.backward(
            _address(dx, row * K * size), add, _CODES[dy.dtype], _CODES[lora_A.dtype],
            dy.data_ptr() + row * dy.stride(0) * size, dy.stride(0), _address(x, row * stride * size), stride,
            lora_A.data_ptr() + rank * K * wide, lora_B.data_ptr() + rank * wide,
            S.data_ptr() + (row * R + rank) * size, _address(dA, rank * K * wide), _address(dB, rank * wide),
            count, N, K, r, R, scaling, p, seed, torch.get_num_threads(),
        )  # fmt: skip


def _parts(update: Update, M: int) -> tuple[Tensor, Tensor, Tensor | None, list[tuple]]:
    """lora_A and lora_B, dense, the seeds, and of each adapter (first row, rows, first rank, ranks, scaling, p, address
    of its seed). The scalings of a bank are in its lora_A, so that S holds them."""
    lora_A, lora_B, scaling, p, seed, bank = update
    if bank is None:
        parts = [(0, M, 0, lora_A.shape[0], scaling, p, _address(seed))]
        return _dense(lora_A), _dense(lora_B), seed, parts
    seeds = None if seed is None else bank.seeds(seed)
    parts = [
        (start, stop - start, bank.starts[i], bank.ranks[i], 1.0, bank.ps[i], _address(seeds, 8 * i))
        for start, stop, i in bank.grouped
    ]
    return lora_A * bank.column.to(lora_A.dtype), _dense(lora_B), seeds, parts


def s_factor(scaling: float, p: float, device: torch.device) -> float:
    """S holds dropout's factor, but not the scaling."""
    return scaling


def mask(seed: Tensor, M: int, K: int, p: float | Bank) -> Tensor:
    if isinstance(p, Bank):
        found, seeds = torch.ones((M, K), dtype=torch.bool, device="cpu"), p.seeds(seed)
        for start, stop, i in p.grouped:
            found[start:stop] = mask(seeds[i], stop - start, K, p.ps[i])
        return found if p.order is None else torch.empty_like(found).index_copy_(0, p.order, found)
    factors = torch.empty((M, K), dtype=torch.float32, device="cpu")
    _cpu.mask(factors.data_ptr(), M, K, p, seed.data_ptr())
    return factors != 0


def _refuse_devices(**tensors: Tensor | None) -> None:
    """What ATen would say, said before the kernels read an address that is not theirs."""
    for name, t in tensors.items():
        if t is not None and not t.is_cpu:
            raise RuntimeError(f"{name} is on {t.device} and x on cpu; they need one device")


def _address(t: Tensor | None, offset: int = 0) -> int:
    return 0 if t is None else t.data_ptr() + offset


def _dense(t: Tensor) -> Tensor:
    """t with dense memory that holds its numbers: neither negated nor zero by declaration."""
    if t.is_neg():
        t = t.resolve_neg()
    return t.clone() if t._is_zerotensor() else t.contiguous()


def _dense_rows(t: Tensor) -> Tensor:
    """t (M, K) with the elements of a row side by side; a row may lie anywhere."""
    return t if t.stride(1) == 1 and not t.is_neg() and not t._is_zerotensor() else _dense(t)


PATH = Path("cpu", why_not, forward, backward, mask, s_factor, CASES, fingerprint, why_slow)
