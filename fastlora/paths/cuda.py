"""Path `cuda`: the CUDA C++ kernels for Hopper, one launch forward and one backward (csrc/cuda, kernels/cuda.py).

| forward                             | backward                               |
| ----------------------------------- | -------------------------------------- |
| Y and S: a GEMM, and CTAs beside it | dX, dA, dB: a GEMM, and CTAs beside it |

TMA reads rows that begin at multiples of 16 bytes. x, dY or a weight that lies otherwise (a transposed one: GPT-2's
Conv1D) are copied first; whether that still pays is what tuning measures.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastlora.kernels import cuda as kernels
from fastlora.paths import gpu, mask
from fastlora.paths.path import Path
from fastlora.paths.problem import Problem, Update, check_saved, rows


def why_not(device: torch.device, problem: Problem | None) -> str | None:
    if problem is not None and problem.bank:
        return "it takes one adapter at a time"
    return kernels.why_not(device) or (None if problem is None else kernels.unsupported(problem))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
    lora_A, lora_B, _, p, seed, _ = update
    x2, y = rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
    S = kernels.forward(
        _laid(x2), _laid(weight), None if bias is None else _aligned(bias), lora_A, lora_B, _exact(update), p, seed,
        y.view(x2.shape[0], weight.shape[0]),
    )  # fmt: skip
    return y, S


def backward(dy, x, weight, S, update, need_B):
    check_saved(dy, x, weight, S, update)
    lora_A, lora_B, _, p, seed, _ = update
    return kernels.backward(
        _laid(dy), None if x is None else _laid(rows(x)), None if weight is None else _laid(weight), lora_A, lora_B,
        S.contiguous(), _exact(update), p, seed, need_B,
    )  # fmt: skip


def _exact(update: Update) -> float:
    """The scaling to hand to kernels, which divide what they keep by 1 - round(p·65536)/65536, so that it is 1 - p."""
    scaling, p = update.scaling, update.dropout_p
    return scaling if p in (0.0, 1.0) else scaling * (1.0 - mask.threshold(p) / 65536) / (1.0 - p)


def _laid(matrix: Tensor) -> Tensor:
    return matrix if kernels.fits(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def _aligned(bias: Tensor) -> Tensor:
    return (
        bias if bias.stride(0) == 1 and bias.data_ptr() % 4 == 0 else bias.clone(memory_format=torch.contiguous_format)
    )


def fingerprint() -> str:
    """The library's machine code."""
    return hashlib.sha256(kernels.LIBRARY.read_bytes()).hexdigest()


# several row blocks and tiles a CTA, more than one part in the queue, every rank's kernel, the mask in dX's tail
_SIZES = (
    (4224, 1288, 1032, 16, 0.0),
    (8320, 520, 776, 32, 0.3),
    (264, 2056, 264, 64, 0.3),
    (257, 520, 1032, 128, 0.0),
)
CASES = tuple((*sizes, x, a) for x in kernels.DTYPES for a in (x, torch.float32) for sizes in _SIZES)

PATH = Path("cuda", why_not, forward, backward, mask.keep_mask, gpu.s_factor, CASES, fingerprint)
