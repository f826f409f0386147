"""The layers that LoRA can be put on, and their base weights: whatever can show itself as (N, K) for one product.

A plain weight is a Tensor and shows itself. A quantised one is a `Packed`: it has the sizes of what it stands for, and
dequantises when `dense` asks; the result is never kept for backward. Another form goes into `form_of`, `_statistics`,
`why_not_packed` and `Packed`. No package is imported here: their weights can only be met once they have been.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 21  # bytes dequantised at a time on a CPU: they are copied while they are in its cache
_reused = threading.local()


def base_parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """(weight, bias, whether the module stores it as (K, N)) of an `nn.Linear`, transformers' `Conv1D`, or a linear
    layer of bitsandbytes or torchao. A plain weight comes as (N, K), a quantised one as the parameter that it is.

    Raises TypeError for any other module, and for weights that are neither plain floating-point parameters nor known.
    """
    kind, transposed, form = type(linear).__name__, is_conv1d(linear), form_of(linear)
    if not (transposed or form or (isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward)):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {kind}")
    if "forward" in linear.__dict__:
        raise TypeError(f"linear has a forward of its own (off-loading hooks, say) that would be lost: {kind}")
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if form:
        reason = why_not_packed(linear)
        if reason is not None:
            raise TypeError(f"linear.weight cannot be dequantised: {reason}")
        return weight, bias, False
    if weight is None or type(weight.data) is not Tensor or weight.dtype not in DTYPES or weight.ndim != 2:
        what = "no plain parameter" if weight is None else f"{type(weight.data).__name__} of {weight.dtype}"
        raise TypeError(f"linear.weight must be a plain 2-D parameter of 16, 32 or 64-bit floats, got {what}")
    return (weight.detach().t() if transposed else weight), bias, transposed


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, which stores its weight as (K, N)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def form_of(module: nn.Module) -> str | None:
    """How `module`, a linear layer, has its weight quantised: "4bit" or "8bit" of bitsandbytes, "torchao"; or None."""
    bnb = sys.modules.get("bitsandbytes.nn")
    if bnb is not None and isinstance(module, (bnb.Linear4bit, bnb.Linear8bitLt)):
        return "4bit" if isinstance(module, bnb.Linear4bit) else "8bit"
    ao = sys.modules.get("torchao.utils")
    if ao is not None and isinstance(module, nn.Linear) and isinstance(module.weight, ao.TorchAOBaseTensor):
        return "torchao"
    return None


def why_not_packed(module: nn.Module) -> str | None:
    """Why a quantised layer's weight cannot show itself as (N, K) now; None if it can."""
    form, state = form_of(module), _statistics(module)
    if form == "torchao":
        plain = type(module).forward is nn.Linear.forward and hasattr(module.weight, "dequantize")
        return None if plain else f"a {type(module.weight).__name__} cannot be dequantised"
    if state is None:
        return "it is quantised when it is moved to its device, and was not yet"
    if form == "8bit":
        return "its weights are kept in 16 bits" if module.state.has_fp16_weights else None
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed it for inference on a CPU"
    shape = (module.out_features, module.in_features)
    return None if tuple(state.shape) == shape else f"it was quantised as {tuple(state.shape)}, not {shape}"


def _statistics(module: nn.Module) -> object:
    """What stands beside a quantised weight to make numbers of it. bitsandbytes moves it about."""
    form, weight = form_of(module), module.weight
    if form == "4bit":
        state = getattr(weight, "quant_state", None)
        return module.quant_state if state is None else state
    return (weight.SCB if module.state.SCB is None else module.state.SCB) if form == "8bit" else None


def logical_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of what was quantised. bitsandbytes' 8-bit layers do not say: their bias's, or the default."""
    form, bias = form_of(module), module.bias
    if form == "8bit":
        return torch.get_default_dtype() if bias is None else bias.dtype
    return _statistics(module).dtype if form == "4bit" else module.weight.dtype


def compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which a quantised layer would multiply x itself."""
    if form_of(module) != "4bit":
        return x.dtype
    if not module.compute_type_is_set:  # as its own first call would
        module.set_compute_type(x)
        module.compute_type_is_set = True
    return module.compute_dtype or x.dtype


class Packed:
    """A quantised weight, frozen, in the place of a Tensor (N, K) of `dtype`, which `dense` makes of it."""

    __slots__ = ("dtype", "form", "shape", "statistics", "weight")
    requires_grad = False

    def __init__(self, weight: Tensor, form: str, statistics: object, shape: torch.Size, dtype: torch.dtype) -> None:
        self.weight, self.form, self.statistics, self.shape, self.dtype = weight, form, statistics, shape, dtype

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Packed:
        shape = torch.Size((module.out_features, module.in_features))
        return cls(module.weight, form_of(module), _statistics(module), shape, dtype)

    def to(self, dtype: torch.dtype) -> Packed:
        return self if dtype is self.dtype else Packed(self.weight, self.form, self.statistics, self.shape, dtype)

    def dense(self, keep: bool = False) -> Tensor:
        """The weight (N, K). On a CPU a large one lies in a buffer of the thread, until the next call: fresh memory
        costs several times what dequantising does there. `keep` asks for memory of its own."""
        (N, K), rows = self.shape, self._rows()
        step = self.statistics.blocksize if self.form == "4bit" else 1  # so that blocks begin where chunks do
        step *= max(1, _CHUNK // max(1, K * step * self.dtype.itemsize))
        if step >= N or self.form == "torchao" or not self.weight.is_cpu:
            return rows(0, N)
        out = torch.empty((N, K), dtype=self.dtype) if keep else _buffer(N * K, self.dtype).view(N, K)
        for start in range(0, N, step):
            out[start : start + step] = rows(start, min(start + step, N))
        return out

    def _rows(self) -> Callable[[int, int], Tensor]:
        """What makes rows `start` to `stop` of the weight, by the package's own function."""
        data, state, K, dtype = self.weight.data, self.statistics, self.shape[1], self.dtype
        if self.form == "torchao":
            return lambda start, stop: self.weight.dequantize().to(dtype)
        bnb = sys.modules["bitsandbytes.functional"]
        if self.form == "8bit":
            return lambda start, stop: bnb.int8_vectorwise_dequant(data[start:stop], state[start:stop]).to(dtype)
        absmax, size, code, data = state.absmax, state.blocksize, state.code, data.view(torch.uint8).view(-1)
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset

        def rows(start: int, stop: int) -> Tensor:
            first, last = start * K, stop * K
            part = absmax[first // size : -(-last // size)]
            part = bnb.QuantState(part, (stop - start, K), code, size, state.quant_type, dtype)
            return bnb.dequantize_4bit(data[first // 2 : -(-last // 2)], part)

        return rows


def dense(weight: Tensor | Packed, keep: bool = False) -> Tensor:
    """A base weight as (N, K) in memory, for the length of one product: whence every path takes its weight."""
    return weight.dense(keep) if weight.__class__ is Packed else weight


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    held = _reused.__dict__.get(dtype)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # else training could not write into it later
            held = _reused.__dict__[dtype] = torch.empty(size, dtype=dtype)
    return held[:size]
