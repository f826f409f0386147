"""Quantised bases and DoRA in the campaign of numbers: which cases, the layers of bitsandbytes, and DoRA's truth."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora.accuracy import Inputs

from .case import DTYPES, TRANSFORMS, Case

FOUR_BITS = ("nf4", "nf4 double", "fp4", "fp4 double")
COLUMNS = 8  # with DoRA, at least: of fewer the norm's three terms may cancel
DORA_MODES = ("plain", "no_grad", "inference", "checkpoint", "reentrant", "retain", "shared", "kept_elsewhere",
              "other_thread")  # fmt: skip


def vary(case: Case, rng: random.Random, kernels: bool) -> Case:
    """`case`, or now and then one like it over a quantised base, with DoRA, or with both."""
    fits = min(case.N, case.K) > 0 and not case.special and case.size is None and case.dtype != "f64"
    if not fits or case.adapter == "f64" or case.face == "conv1d" or rng.random() < 0.6:
        return case
    which = rng.choice(("base", "base", "dora", "both"))
    if which != "dora" and not (case.face == "peft" and case.mode in (*TRANSFORMS, "autocast")):  # these PEFT computes
        base = rng.choice((*FOUR_BITS, *(() if kernels else ("int8",))))
        # bitsandbytes' 8-bit layers do not say of which dtype they are, but for the bias
        case = replace(case, base=base, weight="plain", bias=case.bias or base == "int8")
    if which == "base" or case.face == "function" or case.mode not in DORA_MODES or abs(case.scaling) > 100:
        return case
    wants = case.wants + "m" * (rng.random() < 0.7)
    return replace(case, dora=True, K=max(case.K, COLUMNS), scaling_is="float", wants=wants)


def quantise(kind: str, weight: Tensor) -> nn.Module:
    """A linear layer of bitsandbytes with `weight` (N, K), without a bias."""
    import bitsandbytes

    N, K = weight.shape
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(K, N, False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(K, N, False, weight.dtype, "double" in kind, kind.split()[0])
    layer.to(weight.dtype).load_state_dict({"weight": weight})
    return layer.to("cpu")


def dequantised(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Its weight, by the formula."""
    import bitsandbytes.functional as bnb

    weight = layer.weight
    if weight.dtype is torch.int8:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return bnb.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    state, packed = weight.quant_state, weight.data.view(-1)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    shape = layer.out_features, layer.in_features
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).view(-1).long()][: shape[0] * shape[1]]
    return (values * absmax.repeat_interleave(state.blocksize)[: len(values)]).to(dtype).view(shape)


def magnitude_of(case: Case, inputs: Inputs) -> Tensor:
    """(N,): the norms of the rows of weight + update, changed as training would."""
    total = inputs.weight.double() + case.scaling * inputs.lora_B.double() @ inputs.lora_A.double()
    noise = torch.randn(case.N, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    return (total.norm(dim=1) * (1.0 + 0.1 * noise)).to(DTYPES[case.adapter or case.dtype])


def dora_known(inputs: Inputs, magnitude: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Eager's results, the truth, and the expressions on absolute values: what `accuracy.violations` takes."""

    def run(t: Inputs, m: Tensor) -> dict[str, Tensor]:
        leaves = [s if s is None else s.detach().clone().requires_grad_() for s in (t.x, t.lora_A, t.lora_B, m, t.bias)]
        x, A, B, m, bias = leaves
        keywords = {"mask": t.mask, "dropout_p": t.dropout_p}
        y = reference.dora_linear(x, t.weight, A, B, m, bias, t.scaling, **keywords)
        y.backward(t.dy.to(y.dtype))
        names = zip(("dX", "dA", "dB", "dm", "dbias"), leaves, strict=True)
        return {"Y": y.detach(), **{name: leaf.grad for name, leaf in names if leaf is not None}}

    exact = inputs.map(Tensor.double)
    total = exact.weight + exact.scaling * exact.lora_B @ exact.lora_A
    g = (magnitude.double() / total.norm(dim=1)).abs()
    a = inputs.map(lambda t: t.double().abs())
    s, K, N = abs(inputs.scaling), a.x.shape[-1], a.dy.shape[-1]
    kept = 1.0 if inputs.mask is None else inputs.mask.reshape(-1, K) / (1.0 - inputs.dropout_p)
    x, dy = a.x.reshape(-1, K), a.dy.reshape(-1, N)
    dropped = x * kept
    u = dropped @ a.weight.t() + s * dropped @ a.lora_A.t() @ a.lora_B.t()
    dS = (dy * g) @ a.lora_B * s
    sizes = {
        "Y": (g * u + x @ a.weight.t() + dropped @ a.weight.t() + (0.0 if a.bias is None else a.bias)).view(a.dy.shape),
        "dX": (dy @ a.weight + ((dy * (g + 1.0)) @ a.weight + dS @ a.lora_A) * kept).view(a.x.shape),
        "dA": dS.t() @ dropped,
        "dB": (dy * g).t() @ (dropped @ a.lora_A.t()) * s,
        "dm": (dy * u).sum(0) * g / magnitude.double().abs(),
        "dbias": dy.sum(0),
    }
    return run(inputs, magnitude), run(exact, magnitude.double()), sizes
