"""How the paths compute projections that read the same x: the rank terms from one read of it, dX summed as it is made.

| path               | forward                         | backward                                            |
| ------------------ | ------------------------------- | --------------------------------------------------- |
| `torch`            | one product for all S           | one product for all dA, one for all dS A            |
| `cpu`              | one after the other             | one after the other, dX += by kernels and ATen      |
| `hybrid`           | a kernel for all S, one for S B | one for all dS and dB, one for dA and Σ drop'(dS A) |
| `split`, `onepass` | a kernel for all S, one for Y   | the same, and one for Σ dY W                        |

"All" are as many as a launch holds: fastlora/kernels/shared.py, grouped.py and gemm_each.py. Elsewhere dX = Σ dY W is
summed by ATen's GEMMs (beta = 1), in the order of the projections. S holds what each path's own S holds. On a GPU path
`torch` computes them apart where the node in C++ is there, which is faster one by one than Python is for all.
With dropout each projection has a mask of its own: then `torch` makes and reads a dropped x for each, as without
sharing; the kernels still read x once and make every mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.paths import aten, cpu, gpu
from fastlora.paths.mask import drop
from fastlora.paths.path import Path
from fastlora.paths.problem import Update, base_product, check_saved, rows


class Projection(NamedTuple):
    """One of those that share x: weight (N, K), which backward may lack where no dX is asked for, and bias (N,)."""

    weight: Tensor | None
    bias: Tensor | None
    update: Update


class Needs(NamedTuple):
    """What is asked for of dX, and of dA and dB of each projection."""

    x: bool
    A: tuple[bool, ...]
    B: tuple[bool, ...]


Made = tuple[list[Tensor], list[Tensor]]  # y (..., N), fresh, and S (M, R) of each
Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]  # dX (M, K); dA and dB of each


class Shared(NamedTuple):
    """forward: (x, projections) -> Made; backward: (each dy (M, N), x, projections, each S, needs) -> Gradients."""

    forward: Callable[[Tensor, list[Projection]], Made]
    backward: Callable[[list[Tensor], Tensor | None, list[Projection], list[Tensor], Needs], Gradients]


def torch_forward(x: Tensor, many: list[Projection]) -> Made:
    scalings = {one.update.scaling for one in many}
    if many[0].update.dropout_p > 0.0 or not (x.is_cpu or len(scalings) == 1):
        return tuple(map(list, zip(*(aten.forward(x, *one) for one in many), strict=True)))
    x2, A = rows(x), _all_A(x, many)
    S = torch.mm(x2, A.t()) if x.is_cpu else aten._product(x2, A.t(), scalings.pop())
    each = list(S.split([one.update.lora_A.shape[0] for one in many], 1))
    ys = [base_product(x, weight, bias) for weight, bias, _ in many]
    for y, part, (weight, _, update) in zip(ys, each, many, strict=True):
        left = aten.s_factor(update.scaling, 0.0, x.device)
        aten._add_product(y.view(part.shape[0], weight.shape[0]), part, update.lora_B.to(x.dtype).t(), left)
    return ys, each


def torch_backward(dys, x, many, Ss, needs) -> Gradients:
    dys = [dy if 1 in dy.stride() and 0 not in dy.stride() else dy.contiguous() for dy in dys]
    x2 = rows(x) if any(needs.A) else None
    dx, dAs, dBs = _summed_product(dys, many) if needs.x else None, [None] * len(many), [None] * len(many)
    dSs, dtype = [], dys[0].dtype
    for i, (dy, S, (_, _, update)) in enumerate(zip(dys, Ss, many, strict=True)):
        lora_A, lora_B, scaling, p, seed, *_ = update
        if needs.B[i]:
            dBs[i] = aten._product(S.t(), dy, aten.s_factor(scaling, p, dy.device)).t()
        if not needs.x and not needs.A[i]:
            dSs.append(dy.new_zeros(S.shape))
            continue
        dSs.append(aten._product(dy, lora_B.to(dtype), scaling))
        if p > 0.0:
            kept = aten._kept(p)
            u = aten._product(dSs[i], lora_A.to(dtype), kept) if needs.x else None
            dropped = drop(seed, p, x2 if needs.A[i] else None, u) if needs.x or needs.A[i] else None
            if needs.A[i]:
                dAs[i] = aten._product(dSs[i].t(), dropped, kept)
            if needs.x:
                dx += u
    if many[0].update.dropout_p > 0.0 or not (needs.x or any(needs.A)):
        return dx, dAs, dBs
    dS = torch.cat(dSs, 1)
    if any(needs.A):
        dA = torch.mm(dS.t(), x2).split([S.shape[1] for S in Ss])
        dAs = [part if need else None for part, need in zip(dA, needs.A, strict=True)]
    if needs.x:
        dx.addmm_(dS, _all_A(dys[0], many))
    return dx, dAs, dBs


def cpu_forward(x: Tensor, many: list[Projection]) -> Made:
    return tuple(map(list, zip(*(cpu.forward(x, *one) for one in many), strict=True)))


def cpu_backward(dys, x, many, Ss, needs) -> Gradients:
    dx, dAs, dBs = None, [], []
    for i, (dy, S, (weight, _, update)) in enumerate(zip(dys, Ss, many, strict=True)):
        x_or_none, weight = x if needs.A[i] else None, weight if needs.x else None
        dx, dA, dB = cpu.backward(dy, x_or_none, weight, S, update, needs.B[i], onto=dx)
        dAs.append(dA)
        dBs.append(dB)
    return dx, dAs, dBs


def hybrid_forward(x: Tensor, many: list[Projection]) -> Made:
    def to_ys(x2, weights, biases, Ss, Bs, ys):
        from fastlora.kernels.grouped import up_each

        up_each(Ss, Bs, biases, ys)
        for y, weight in zip(ys, weights, strict=True):
            y.addmm_(x2, weight.t())

    return _kernel_forward(x, many, to_ys)


def split_forward(x: Tensor, many: list[Projection]) -> Made:
    def to_ys(*operands):
        from fastlora.kernels.gemm_each import gemm_each

        gemm_each(*operands)

    return _kernel_forward(x, many, to_ys)


def _kernel_forward(x: Tensor, many: list[Projection], to_ys: Callable) -> Made:
    from fastlora.kernels.shared import s_shared

    x2, updates = rows(x), [gpu._laid_update(one.update) for one in many]
    ys = [x.new_empty((*x.shape[:-1], one.weight.shape[0])) for one in many]
    flat = [y.view(x2.shape[0], y.shape[-1]) for y in ys]
    with gpu._on_device_of(x):
        Ss = s_shared(x2, *_adapters(updates))
        to_ys(x2, [one.weight for one in many], [one.bias for one in many], Ss, [u.lora_B for u in updates], flat)
    return ys, Ss


def hybrid_backward(dys, x, many, Ss, needs) -> Gradients:
    def to_dx(dys, weights, dx):
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)

    return _kernel_backward(dys, x, many, Ss, needs, to_dx)


def split_backward(dys, x, many, Ss, needs) -> Gradients:
    def to_dx(*operands):
        from fastlora.kernels.gemm_each import gemm_sum

        gemm_sum(*operands)

    return _kernel_backward(dys, x, many, Ss, needs, to_dx)


def _kernel_backward(dys, x, many, Ss, needs, to_dx: Callable) -> Gradients:
    from fastlora.kernels.grouped import ds_db_each
    from fastlora.kernels.shared import da_dx_shared

    for dy, S, (weight, _, update) in zip(dys, Ss, many, strict=True):
        check_saved(dy, x, weight, S, update)
    dys, updates = [gpu._laid(dy) for dy in dys], [gpu._laid_update(one.update) for one in many]
    dx = dys[0].new_empty((dys[0].shape[0], updates[0].lora_A.shape[1])) if needs.x else None
    with gpu._on_device_of(dys[0]):
        As, scalings, dropouts = _adapters(updates)
        dSs, dBs = ds_db_each(dys, [u.lora_B for u in updates], Ss, scalings)
        x2 = rows(x) if any(needs.A) else None
        dAs = da_dx_shared(dSs, x2, As, dropouts, needs.A, dx)
        if dx is not None:
            to_dx(dys, [one.weight for one in many], dx)
    return dx, dAs, dBs


def _adapters(updates: list[Update]) -> tuple[list[Tensor], list[float], list]:
    return [u.lora_A for u in updates], [gpu._factor(u) for u in updates], [gpu._dropout(u) for u in updates]


def _all_A(t: Tensor, many: list[Projection]) -> Tensor:
    return torch.cat([one.update.lora_A.to(t.dtype) for one in many])  # (ΣR, K)


def _summed_product(dys: list[Tensor], many: list[Projection]) -> Tensor:
    dx = torch.mm(dys[0], many[0].weight)
    for dy, one in zip(dys[1:], many[1:], strict=True):
        dx.addmm_(dy, one.weight)
    return dx


SHARED = {
    "torch": Shared(torch_forward, torch_backward),
    "cpu": Shared(cpu_forward, cpu_backward),
    "hybrid": Shared(hybrid_forward, hybrid_backward),
    "onepass": Shared(split_forward, split_backward),
    "split": Shared(split_forward, split_backward),
}


def made(path: Path, x: Tensor, many: list[Projection]) -> Made:
    """y and S of each by `path`; one alone by the path's own forward."""
    if len(many) > 1:
        return SHARED[path.name].forward(x, many)
    y, S = path.forward(x, *many[0])
    return [y], [S]


def gradients(path: Path, dys, x, many: list[Projection], Ss, needs: Needs) -> Gradients:
    """dX, and dA and dB of each, where `needs` asks for them. No dA where x is None, no dX where there is no weight."""
    if len(many) > 1:
        return SHARED[path.name].backward(dys, x, many, Ss, needs)
    dx, dA, dB = path.backward(dys[0], x, many[0].weight, Ss[0], many[0].update, needs.B[0])
    return dx, [dA], [dB]


KERNELS = frozenset({"hybrid", "onepass", "split"})  # one mask and one S: what they forward, each may take back
WIDEST = 64  # rank that these kernels add to dX from registers; wider ones are computed one by one
