"""`Packed`: a quantised weight in the place of a dense one; `dense` is whence every path takes its weight.

What is dequantised lives for one product and is not kept for backward, in compiled code neither.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting
from torch.utils.checkpoint import checkpoint

from fastlora import env

_CHUNK = 1 << 21  # bytes dequantised at a time on a CPU: they are copied while they are in its cache
_reused = threading.local()


class Packed:
    """A quantised weight, frozen, in the place of a Tensor (N, K) of `dtype`, which `dense` makes of it.

    As autograd refuses a saved tensor that was changed in place, `dense` refuses a weight changed since this was made.
    A graph keeps this; forward makes another. Storage that moves, as offloading moves it, is no change.
    """

    __slots__ = ("dtype", "form", "made", "shape", "statistics", "version", "weight")
    requires_grad = False

    def __init__(self, weight: Tensor, form: str, statistics: object, shape: torch.Size, dtype: torch.dtype) -> None:
        self.weight, self.form, self.statistics, self.shape, self.dtype = weight, form, statistics, shape, dtype
        self.made: Tensor | None = None
        self.version = self._now()

    def _now(self) -> int | None:
        if is_compiling():
            return None
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return self.weight._version
        except RuntimeError:  # made in inference mode: no version is kept
            return None

    @property
    def changed(self) -> bool:
        """Whether the weight was changed in place since."""
        return self.version is not None and self._now() not in (None, self.version)

    def to(self, dtype: torch.dtype) -> Packed:
        return self if dtype is self.dtype else Packed(self.weight, self.form, self.statistics, self.shape, dtype)

    def once(self) -> Packed:
        """The same, dequantised for all that follows until its `made` is None again."""
        other = Packed(self.weight, self.form, self.statistics, self.shape, self.dtype)
        other.made = self.dense()
        return other

    def dense(self, keep: bool = False) -> Tensor:
        """The weight (N, K). On a CPU a large one lies in a buffer of the thread, until the next call: fresh memory
        costs several times what dequantising does there. It is as large as the largest weight that it has held, and
        freed with that one. `keep` asks for memory of its own."""
        if self.changed:
            raise RuntimeError(
                f"a quantised weight needed for backward was modified in place: it is at version {self._now()}, "
                f"expected version {self.version}"
            )
        if self.made is not None and not keep:
            return self.made
        N, K = self.shape
        if self.form == "4bit" and (not self.weight.is_cpu or env.interpreting()) and not is_compiling():
            from fastlora.paths import gpu

            if gpu.why_not(self.weight.device, None) is None:
                from fastlora.kernels.dequantise import four_bits

                return four_bits(self.weight.data, self.statistics, self.shape, self.dtype, self._whole)
        step = self.statistics.blocksize if self.form == "4bit" else 1  # so that blocks begin where chunks do
        step *= max(1, _CHUNK // max(1, K * step * self.dtype.itemsize))
        if self.form == "torchao" or step >= N or not self.weight.is_cpu or is_compiling():
            return self._whole()
        out, rows = torch.empty((N, K), dtype=self.dtype) if keep else self._buffer(N * K).view(N, K), self._rows()
        for start in range(0, N, step):
            out[start : start + step] = rows(start, min(start + step, N))
        return out

    def _whole(self) -> Tensor:
        """The weight by its package's own function, at once."""
        if self.form == "torchao":
            with torch._C.DisableTorchFunctionSubclass():  # which costs a fifth of a small weight's time
                return self.weight.dequantize().to(self.dtype)
        data, state, dtype, bnb = self.weight.data, self.statistics, self.dtype, sys.modules["bitsandbytes.functional"]
        if self.form == "8bit":
            return bnb.int8_vectorwise_dequant(data, state).to(dtype)
        shape = _as_stored(self.shape, state.blocksize)
        if state.dtype is not dtype or shape is not self.shape:
            kind = state.blocksize, state.quant_type, dtype
            state = bnb.QuantState(state.absmax, shape, state.code, *kind, state.offset, state.state2)
        return bnb.dequantize_4bit(data, state).view(self.shape)  # one byte comes back transposed

    def _rows(self) -> Callable[[int, int], Tensor]:
        """The same for rows `start` to `stop`."""
        data, state, K, dtype = self.weight.data, self.statistics, self.shape[1], self.dtype
        bnb = sys.modules["bitsandbytes.functional"]
        if self.form == "8bit":
            return lambda start, stop: bnb.int8_vectorwise_dequant(data[start:stop], state[start:stop]).to(dtype)
        absmax, size, code, data = state.absmax, state.blocksize, state.code, data.view(torch.uint8).view(-1)
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset

        def rows(start: int, stop: int) -> Tensor:
            first, last = start * K, stop * K
            part = absmax[first // size : -(-last // size)]
            part = bnb.QuantState(part, _as_stored((stop - start, K), size), code, size, state.quant_type, dtype)
            return bnb.dequantize_4bit(data[first // 2 : -(-last // 2)], part).view(stop - start, K)

        return rows

    def _buffer(self, size: int) -> Tensor:
        held = _reused.__dict__.setdefault("held", _Buffers())
        out = held.get(self.dtype)
        if out is None or out.numel() < size:
            with torch.inference_mode(False):  # else training could not write into it later
                out = held[self.dtype] = torch.empty(size, dtype=self.dtype)
            weakref.finalize(self.weight, _free, weakref.ref(held), self.dtype, size).atexit = False
        return out[:size]


def _as_stored(shape: tuple[int, ...], blocksize: int) -> tuple[int, ...]:
    """The shape by which bitsandbytes dequantises 4 bits. Its CPU kernel (0.50, AVX-512) takes wrong blocks for rows of
    16 times a number that are no whole blocks; as one long row they come out right."""
    return shape if shape[1] % blocksize == 0 else (1, shape[0] * shape[1])


class _Buffers(dict):
    """{dtype: buffer} of a thread, gone with it."""


def _free(held: weakref.ref, dtype: torch.dtype, size: int) -> None:
    buffers = held() or {}
    if dtype in buffers and buffers[dtype].numel() == size:  # it has not grown for another
        del buffers[dtype]


def dense(weight: Tensor | Packed, keep: bool = False) -> Tensor:
    """A base weight as (N, K) in memory, for the length of one product: whence every path takes its weight."""
    return weight.dense(keep) if weight.__class__ is Packed else weight


def recomputed(weight: Tensor | Packed) -> Tensor:
    """`dense` for a graph, which keeps its inputs: a compiler keeps the packed weight and dequantises in backward."""
    if weight.__class__ is Packed and is_compiling() and not is_exporting():
        return checkpoint(lambda: weight.dense(keep=True), use_reentrant=False)
    return dense(weight, keep=True)
