"""A call of the CUDA kernels in the emulator, held against the reference by fastlora/accuracy.py's rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastlora import accuracy
from fastlora.kernels import cuda
from fastlora.paths.mask import philox_mask
from tests.cuda.gpu import Emulated

SEED = 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Case:
    """One call. `padding`: elements between the rows of x, dy, weight and y."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.bfloat16
    adapters_float: bool = False
    p: float = 0.0
    bias: bool = True
    sms: int = 5
    padding: int = 0
    need: str = "XAB"
    transposed: bool = False  # the adapters lie by columns

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("+float32" if self.adapters_float else "")
        extra = "".join(f"-{k}{v}" for k, v in (("p", self.p), ("pad", self.padding)) if v)
        extra += ("" if self.bias else "-nobias") + (f"-need{self.need}" if self.need != "XAB" else "")
        return f"{self.M}x{self.N}x{self.K}-r{self.R}-{kind}{extra}-sms{self.sms}"


def spaced(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values with so many elements that belong to nobody between rows."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + padding), float("nan"), dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def exact(scaling: float, p: float) -> float:
    """As the other paths hand it to their kernels, which divide by 1 - round(p * 65536) / 65536."""
    return scaling if p in (0.0, 1.0) else scaling * (1.0 - round(p * 65536) / 65536) / (1.0 - p)


def call(case: Case, gpu: Emulated, kernel: str = "") -> tuple[dict[str, torch.Tensor], accuracy.Inputs]:
    """Forward and backward once, or the one named; what came out, and the inputs to hold it against."""
    inputs = accuracy.draw(
        case.M, case.N, case.K, case.R, case.dtype, adapter_dtype=torch.float32 if case.adapters_float else None,
        bias=case.bias, seed=case.M + case.N,
    )  # fmt: skip
    if case.p:
        mask = philox_mask(torch.tensor(SEED), case.M, case.K, case.p)
        inputs = replace(inputs, dropout_p=case.p % 1.0, mask=mask)  # where all is dropped the reference divides by 0
    x, weight, dy = (spaced(t, case.padding) for t in (inputs.x, inputs.weight, inputs.dy))
    A, B = inputs.lora_A, inputs.lora_B
    if case.transposed:
        A, B = A.t().contiguous().t(), B.t().contiguous().t()
    y = spaced(torch.zeros(case.M, case.N, dtype=case.dtype), case.padding)
    seed = torch.tensor([SEED]) if case.p else None
    scaling = exact(inputs.scaling, case.p)
    out = {}
    with gpu:
        if kernel == "backward":
            S = dropped(inputs) @ inputs.lora_A.to(case.dtype).float().t() * inputs.scaling
            S = S.to(case.dtype)
        else:
            S = cuda.forward(x, weight, inputs.bias, A, B, scaling, case.p, seed, y)
            out["Y"] = y
        if kernel != "forward":
            needed = (x if "A" in case.need else None), (weight if "X" in case.need else None)
            gradients = cuda.backward(dy, *needed, A, B, S, scaling, case.p, seed, "B" in case.need)
            out |= dict(zip(("dX", "dA", "dB"), gradients, strict=True))
    return {name: t for name, t in out.items() if t is not None}, inputs


def dropped(inputs: accuracy.Inputs) -> torch.Tensor:
    x = inputs.x.float()
    return x if inputs.mask is None else x * inputs.mask / (1.0 - inputs.dropout_p)


def violations(case: Case, **options) -> list[str]:
    """What is wrong with the case's results; raises the emulator's Fault."""
    from tests.ptx.launch import Options

    gpu = Emulated(case.sms, Options(**options))
    return accuracy.violations(*call(case, gpu))


def campaign():
    """(case, options of the emulator): what `python -m tests.cuda` runs."""
    half, brain = torch.float16, torch.bfloat16
    for R in (1, 2, 7, 8, 15, 16, 17, 32, 40, 64, 65, 96, 128):
        yield Case(136, 264, 200, R, half if R % 2 else brain, adapters_float=R % 3 == 0, p=0.25 * (R % 4), sms=4), {}
    for M, N, K in ((1, 8, 8), (127, 256, 64), (128, 248, 72), (129, 264, 520), (257, 520, 136), (65, 1032, 8)):
        for p in (0.0, 0.5):
            yield Case(M, N, K, 16, p=p, sms=5, padding=8 * (M % 2)), {}
    for need in ("X", "A", "B", "XA", "XB", "AB"):
        yield Case(200, 264, 264, 24, p=0.1, need=need, bias=False, sms=4), {}
    for p in (1e-6, 0.999, 1.0):
        yield Case(130, 264, 136, 8, half, p=p, sms=3), {}
    for sms in (2, 3, 6, 9):  # one streaming CTA or several; several tiles a CTA or fewer tiles than CTAs
        yield Case(520, 520, 264, 8, p=0.3, sms=sms), {}
        yield Case(520, 520, 264, 128, adapters_float=True, transposed=True, sms=sms), {}
    yield Case(136, 264, 200, 24, p=0.2), {"late": False}
    yield Case(136, 264, 200, 24, p=0.2), {"wgmma_by_warp": True}
    for seed in range(20):
        yield Case(300, 520, 264, 24, p=0.3, sms=3 + seed % 4), {"seed": seed}
        yield Case(264, 264, 136, 128, half, adapters_float=True, p=0.3 * (seed % 2), sms=3 + seed % 3), {"seed": seed}
