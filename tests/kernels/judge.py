"""The error rule for one product of a kernel, and the layouts that every kernel must take."""

from __future__ import annotations

import math

import torch


def judge(got, function, *operands, dtype) -> None:
    """Hold `got` against `function(*operands)` by the rule of fastlora.accuracy; `dtype` is the coarsest operand's.

    Truth is the function in float64; the error may be twice that of the function in the operands' own dtypes (mixed
    ones promoted), plus two units of precision of the function of absolute values, in the largest element and in norm.
    """
    wide = operands[0].dtype
    for operand in operands[1:]:
        wide = torch.promote_types(wide, operand.dtype)
    eager = function(*(t.to(wide) for t in operands)).to(got.dtype)
    truth = function(*(t.double() for t in operands))
    absolute = function(*(t.double().abs() for t in operands))
    assert got.shape == truth.shape
    assert got.isfinite().all()
    error, error_eager = got.double() - truth, eager.double() - truth
    allowed = 2.0 * torch.finfo(dtype).eps * absolute
    for size in (lambda t: t.abs().max(), torch.linalg.vector_norm):
        assert size(error) <= 2.0 * size(error_eager) + size(allowed)


def strided(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a 2-D tensor, lying in memory as `layout` says, with NaN around them."""
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "stepped":
        base = torch.full((rows, 2 * columns), math.nan, dtype=t.dtype)
        view = base[:, ::2]
    elif layout == "sliced":
        base = torch.full((rows + 2, columns + 5), math.nan, dtype=t.dtype)
        view = base[1:-1, 3:-2]
    else:
        raise ValueError(layout)
    view.copy_(t)
    return view


LAYOUTS = ("transposed", "stepped", "sliced")
RANKS = (1, 2, 3, 8, 16, 33, 64, 128)
DTYPES = (torch.float32, torch.float16)


def paired(first, second, third):
    """Half of all triples, with every pair of values of two parameters; the second and the third have two values."""
    return [(a, b, third[(i + j) % 2]) for i, a in enumerate(first) for j, b in enumerate(second)]


def far(t: torch.Tensor) -> torch.Tensor:
    """The values of a 2-D tensor in rows 2**30 elements and more apart: memory is mapped when it is touched."""
    return torch.empty_strided(t.shape, (2**30 + 24, 1), dtype=t.dtype).copy_(t)


def draw(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)
