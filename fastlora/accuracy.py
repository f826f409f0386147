"""What "correct" means, in one function: `violations`.

Truth is `fastlora.reference.lora_linear` in float64. A result may err at most twice as much as the eager reference
in the same dtype, plus two units of precision of the same expression taken on absolute values (what cancellation may
cost); in its largest element, and in norm. The unit is that of the coarsest dtype in the expression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import reference
from fastlora.paths.bank import Bank
from fastlora.paths.shared import Needs


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, dy of shape (..., N) for its backward, and the dropout mask to compare with.

    With a bank x is (M, K), and lora_A and lora_B hold all of its adapters.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    mask: Tensor | None = None
    bank: Bank | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with `function` applied to each tensor but the mask."""
        tensors = {n: getattr(self, n) for n in ("x", "weight", "lora_A", "lora_B", "bias", "dy")}
        return replace(self, **{n: None if t is None else function(t) for n, t in tensors.items()})

    def alone(self) -> list[tuple[Tensor, slice | None, Inputs]]:
        """Each adapter of the bank alone: its rows, its ranks, its call. Last the rows of none, without ranks."""
        bank, found = self.bank, []
        for i, (start, r) in enumerate(zip(bank.starts, bank.ranks, strict=True)):
            ranks = slice(start, start + r)
            own = {"lora_A": self.lora_A[ranks], "lora_B": self.lora_B[:, ranks], "scaling": bank.scalings[i]}
            found.append((bank.rows == i, ranks, replace(self, dropout_p=bank.ps[i], **own)))
        nothing = {"lora_A": self.lora_A[:1] * 0, "lora_B": self.lora_B[:, :1] * 0, "scaling": 0.0, "dropout_p": 0.0}
        found.append((bank.rows == len(bank.ranks), None, replace(self, **nothing)))
        return [
            (rows, ranks, replace(one, x=one.x[rows], dy=one.dy[rows], bank=None,
                                  mask=None if one.mask is None else one.mask[rows]))
            for rows, ranks, one in found
        ]  # fmt: skip


def draw(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, *, adapter_dtype: torch.dtype | None = None, bias: bool = True,
    scaling: float = 2.0, device: torch.device | str = "cpu", seed: int = 0,
) -> Inputs:  # fmt: skip
    """Inputs of a trained layer's scale from a seed: every value of order one, so that each term shows in Y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    adapter = adapter_dtype or dtype
    return Inputs(
        x=normal(M, K),
        weight=normal(N, K, scale=K**-0.5),
        lora_A=normal(R, K, dtype=adapter, scale=K**-0.5),
        lora_B=normal(N, R, dtype=adapter, scale=R**-0.5),
        bias=normal(N) if bias else None,
        dy=normal(M, N),
        scaling=scaling,
    )


def run(function: Callable[..., Tensor], inputs: Inputs, **keywords) -> dict[str, Tensor]:
    """Forward and backward of `function`, a `lora_linear`: Y, dX, dA, dB, dbias."""
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    ]
    x, lora_A, lora_B, bias = leaves
    if inputs.bank is not None:
        keywords["bank"] = inputs.bank
    y = function(x, inputs.weight, lora_A, lora_B, bias, inputs.scaling, inputs.dropout_p, **keywords)
    y.backward(inputs.dy.to(y.dtype))
    gradients = {
        f"d{name}": leaf.grad for name, leaf in zip(("X", "A", "B", "bias"), leaves, strict=True) if leaf is not None
    }
    return {"Y": y.detach(), **gradients}


Expected = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def expected(inputs: Inputs) -> Expected:
    """The eager reference, the truth, and the expression on absolute values: what `violations` compares with. Of a
    bank one such for each adapter alone."""
    if inputs.bank is not None:
        return tuple(expected(one) for *_, one in inputs.alone())
    sizes = replace(inputs.map(lambda t: t.double().abs()), scaling=abs(inputs.scaling))
    return tuple(
        run(reference.lora_linear, one, mask=inputs.mask) for one in (inputs, inputs.map(Tensor.double), sizes)
    )


def violations(got: dict[str, Tensor], inputs: Inputs, units: float = 2.0, known: Expected | None = None) -> list[str]:
    """Every way in which `got`, what `run` returned, breaks the rule, for that many units; empty when it is correct.

    `known` is `expected(inputs)`, where several results are compared with it. NaN and infinity must stand where the
    eager reference has them, and are left out of the figures. Where eager only overflowed, the truth rounded to its
    dtype is right as well: a number, or the infinity that it rounds to. A bank's adapters are each held against their
    own rows alone.
    """
    if inputs.bank is not None:
        return _of_bank(got, inputs, units, known or expected(inputs))
    eager, truth, absolute = known or expected(inputs)
    infos = [torch.finfo(t.dtype) for t in (inputs.x, inputs.lora_A, inputs.lora_B)]
    unit = max(info.eps for info in infos)
    tiny = max(info.smallest_normal * info.eps for info in infos)
    found = []
    for name, value in got.items():
        if value.shape != eager[name].shape or value.dtype != eager[name].dtype:
            found.append(
                f"{name} is {value.dtype}{tuple(value.shape)}, not {eager[name].dtype}{tuple(eager[name].shape)}"
            )
            continue
        # where eager overflows and `value` does not, `value` is held against the truth like any other
        finite = eager[name].isfinite() | (value.isfinite() & truth[name].isfinite())
        rounded = truth[name].to(value.dtype)
        overflow = truth[name].isfinite() & ~eager[name].isfinite() & rounded.isinf() & (value == rounded)
        # the sign of an infinity that was put in may hang on a sum that cancels; that of an overflow is the truth's
        infinite = torch.where(truth[name].isfinite(), value == eager[name], value.isinf() & eager[name].isinf())
        same = torch.where(finite, value.isfinite(), infinite | (value.isnan() & eager[name].isnan()))
        if not (same | overflow).all():
            wrong = int((~(same | overflow)).sum())
            found.append(f"{name} has NaN or infinity where the reference has not, or the reverse ({wrong} elements)")
            continue
        error = torch.where(finite, value.double() - truth[name], 0.0)
        error_eager = torch.where(finite & eager[name].isfinite(), eager[name].double() - truth[name], 0.0)
        allowed = torch.where(finite, units * (unit * absolute[name] + tiny), 0.0)
        for measure, size in (("largest element", _largest), ("norm", torch.linalg.vector_norm)):
            limit = 2.0 * size(error_eager) + size(allowed)
            if not size(error) <= limit:
                found.append(f"{name}: error {size(error):.3g} in its {measure}, over the limit of {limit:.3g}")
    return found


def _of_bank(got: dict[str, Tensor], inputs: Inputs, units: float, known: tuple) -> list[str]:
    found = []
    for i, ((rows, ranks, one), truth) in enumerate(zip(inputs.alone(), known, strict=True)):
        own = {name: got[name][rows] for name in ("Y", "dX") if name in got}
        if ranks is not None:
            own |= {"dA": got["dA"][ranks], "dB": got["dB"][:, ranks]}
        who = f"adapter {i}" if ranks is not None else "no adapter"
        found += [f"{who}: {what}" for what in violations(own, one, units, truth)]
    return found


def shared_violations(
    function: Callable, many: Sequence[Inputs], units: float = 2.0, needs: Needs | None = None
) -> list[str]:
    """Every way in which `function`, a `lora_linears`, breaks the rule on inputs that share x and dropout_p.

    The eager reference and the truth of dX are the sums of what the projections give one by one. `needs`: which
    gradients are asked for, beside those of biases; all.
    """
    known, every = [expected(one) for one in many], (True,) * len(many)
    need_x, need_A, need_B = needs or (True, every, every)
    x = many[0].x.detach().requires_grad_(need_x)
    leaves = [
        [one.lora_A.detach().requires_grad_(A), one.lora_B.detach().requires_grad_(B),
         None if one.bias is None else one.bias.detach().requires_grad_()]
        for one, A, B in zip(many, need_A, need_B, strict=True)
    ]  # fmt: skip
    each = [(one.weight, *leaf, one.scaling) for one, leaf in zip(many, leaves, strict=True)]
    ys = function(x, each, many[0].dropout_p)
    if ys[0].requires_grad:
        torch.autograd.backward(list(ys), [one.dy for one in many])
    found = []
    for y, one, own, leaf in zip(ys, many, known, leaves, strict=True):
        named = zip(("A", "B", "bias"), leaf, strict=True)
        gradients = {f"d{name}": t.grad for name, t in named if t is not None and t.requires_grad}
        found += violations({"Y": y.detach(), **gradients}, one, units, own)
    sums = tuple({"dX": sum(own[which]["dX"] for own in known)} for which in range(3))
    return found + violations({"dX": x.grad} if need_x else {}, many[0], units, sums)


def _largest(t: Tensor) -> Tensor:
    return t.abs().max() if t.numel() else t.new_zeros(())
