"""What a path is given: the sizes and types of one call, and the update that it adds to the base's product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.paths.bank import Bank


class Layout(NamedTuple):
    """How x as (M, K) and the weight (N, K) lie in memory: their strides, and their addresses modulo 16.

    A problem has none where both are contiguous and start at a multiple of 16 bytes. Adapters and biases are
    parameters, and taken to lie so.
    """

    x_strides: tuple[int, int]
    x_offset: int
    weight_strides: tuple[int, int]
    weight_offset: int


class Problem(NamedTuple):
    """One call of the layer. M tokens, N out_features, K in_features, R rank; hashable, to keep a choice by."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    dropout: bool
    layout: Layout | None = None
    tf32: bool = False  # of float32: whether torch allows its products to be made so
    bank: int = 0  # of several adapters, R ranks together: on a CPU the ranks of the largest, on a GPU 1

    @property
    def empty(self) -> bool:
        """Whether there is nothing to multiply. Such calls are ATen's: kernels take sizes from 1."""
        return self.M == 0 or self.N == 0 or self.K == 0


class Update(NamedTuple):
    """All that makes scaling · drop(x) Aᵀ Bᵀ of x, and the only way by which paths learn of it.

    lora_A (R, K), lora_B (N, R), the dropout probability and the seed of its mask (int64, one element; None without
    dropout). Several adapters are a `bank`: it knows every factor, and `scaling` is 1; S then holds all of them.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None
    bank: Bank | None = None

    @property
    def chance(self) -> float | Bank:
        """What a path's `mask` makes a mask of: the probability, or the bank."""
        return self.dropout_p if self.bank is None else self.bank


def drawn(problem: Problem, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
    """x (M, K), weight, lora_A, lora_B, bias (N,) and dy (M, N) of a problem: random, of a trained layer's scale, laid
    out as its layout says; on its device, or on `meta` without memory."""
    M, N, K, R, dtype, adapter_dtype, own, _, layout, *_ = problem
    device = torch.device(device or own)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(shape, dtype=dtype, scale=1.0, strides=None, offset=0):
        if strides is None:
            size = shape
        else:  # all of the storage at once: rows may overlap
            first = offset // dtype.itemsize
            size = (first + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)),)
        t = torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
        return t if strides is None else t.as_strided(shape, strides, first)

    x_lies, weight_lies = (layout[:2], layout[2:]) if layout else ((), ())
    return (
        normal((M, K), dtype, 1.0, *x_lies),
        normal((N, K), dtype, K**-0.5, *weight_lies),
        normal((R, K), adapter_dtype, K**-0.5),
        normal((N, R), adapter_dtype, R**-0.5),
        normal((N,)),
        normal((M, N)),
    )


def drawn_bank(problem: Problem, device: torch.device | str | None = None) -> Bank | None:
    """The bank of a problem of several adapters: two that share its ranks; the last rows are of neither."""
    if not problem.bank:
        return None
    M, R, third = problem.M, problem.R, -(-problem.M // 3)
    ranks = (R,) if R == 1 else (R // 2, R - R // 2)
    owners = [row // third if row // third < len(ranks) else None for row in range(M)]
    ps = (0.1, 0.25) if problem.dropout else (0.0, 0.0)
    return Bank.of(ranks, (2.0, 0.5)[: len(ranks)], ps[: len(ranks)], owners, 1, torch.device(device or problem.device))


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 and of one element, drawn by torch's generator of `device` and left there.

    Eager and compiled calls draw it alike: Dynamo knows no `Tensor.random_`. On a GPU the node in C++ knows the number
    without a launch (csrc/seeds.h).
    """
    return torch.randint(2**63 - 1, (), device=device)


def draw_seeds(device: torch.device, count: int) -> list[Tensor]:
    """`count` of them, by one launch on a GPU, each at a multiple of 16 bytes; on a CPU one after the other."""
    if device.type == "cpu" or count == 1:
        return [draw_seed(device) for _ in range(count)]
    return list(torch.randint(2**63 - 1, (count, 2), device=device)[:, 0])


def rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K), a view wherever strides allow one. `reshape(-1, K)` cannot tell M when K is 0."""
    dims = t.dim()
    return t if dims == 2 else t.flatten(0, -2) if dims > 2 else t.unsqueeze(0)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which asks ATen even where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` of x (..., K) as a fresh (..., N): F.linear may return a view, on which autograd forbids
    in-place operations."""
    if x.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    out = y.view(x.shape[:-1].numel(), weight.shape[0])
    if bias is None:
        torch.mm(rows(x), weight.t(), out=out)
    else:
        torch.addmm(bias, rows(x), weight.t(), out=out)
    return y


def check_saved(dy: Tensor, x: Tensor | None, weight: Tensor | None, S: Tensor, update: Update) -> None:
    """Refuse what hooks of saved tensors have made of them: kernels read addresses. One expression when all is well."""
    lora_A, lora_B, seed = update.lora_A, update.lora_B, update.seed
    (M, N), (R, K), dtype, adapter_dtype, device = dy.shape, lora_A.shape, dy.dtype, lora_A.dtype, dy.device
    if (
        S.dtype is dtype
        and S.shape == (M, R)
        and lora_B.dtype is adapter_dtype
        and lora_B.shape == (N, R)
        and S.device == lora_A.device == lora_B.device == device
        and (seed is None or (seed.dtype is torch.int64 and seed.numel() == 1 and seed.device == device))
        and (x is None or (x.dtype is dtype and x.shape[-1] == K and x.shape[:-1].numel() == M and x.device == device))
        and (weight is None or (weight.dtype is dtype and weight.shape == (N, K) and weight.device == device))
    ):
        return
    expected = {
        "S": (S, (M, R), dtype),
        "x": (x if x is None else rows(x), (M, K), dtype),
        "weight": (weight, (N, K), dtype),
        "lora_A": (lora_A, (R, K), adapter_dtype),
        "lora_B": (lora_B, (N, R), adapter_dtype),
        "the dropout seed": (seed if seed is None else seed.squeeze(), (), torch.int64),
    }
    for name, (t, shape, kind) in expected.items():
        if t is not None and (t.shape != shape or t.dtype is not kind or t.device != device):
            raise RuntimeError(
                f"{name} came back from saved-tensor hooks as {tuple(t.shape)} {t.dtype} on {t.device}; backward needs "
                f"{shape} {kind} on {device}"
            )
