"""bitsandbytes' NF4 and FP4 to (N, K): W[i] = code[q[i]] · absmax[i // blocksize], bit for bit as bitsandbytes.

With double quantisation absmax[b] = absmax_code[absmax_q[b]] · absmax_scale[b // 256] + offset, in the same launch. Two
values lie in a byte, the first in its high half. Products and the sum are rounded one by one: nothing is contracted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.errors import warn_once
from fastlora.kernels.launch import Launch

BLOCK = 4096  # values of a program
_admitted: dict[tuple, bool] = {}


@triton.jit
def dequantise_kernel(
    out_ptr, q_ptr, code_ptr, absmax_ptr, absmax_code_ptr, absmax_scale_ptr, offset_ptr, size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + 2 * tl.arange(0, BLOCK // 2)
    block = offs // BLOCKSIZE
    q = tl.load(q_ptr + offs // 2, mask=offs < size, other=0)  # [BLOCK // 2]
    scale = tl.load(absmax_ptr + block, mask=offs < size, other=0)
    if NESTED:
        outer = tl.load(absmax_scale_ptr + block // NESTED, mask=offs < size, other=0.0)
        scale = tl.load(absmax_code_ptr + scale) * outer + tl.load(offset_ptr)
    values = tl.interleave(tl.load(code_ptr + (q >> 4)) * scale, tl.load(code_ptr + (q & 15)) * scale)
    offs = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, values.to(out_ptr.dtype.element_ty), mask=offs < size)


def launch(q: Tensor, state: object, out: Tensor) -> Launch:
    """q: the packed weight, uint8, flat; `state`: bitsandbytes' `QuantState` of it; out (N, K), contiguous."""
    nested = state.state2
    args = {
        "out_ptr": out, "q_ptr": q, "code_ptr": state.code, "absmax_ptr": state.absmax,
        "absmax_code_ptr": nested and nested.code, "absmax_scale_ptr": nested and nested.absmax,
        "offset_ptr": nested and state.offset, "size": out.numel(),
        "BLOCKSIZE": state.blocksize, "NESTED": nested.blocksize if nested else 0, "BLOCK": BLOCK,
    }  # fmt: skip
    return Launch(
        dequantise_kernel, (triton.cdiv(out.numel(), BLOCK),), args, {"num_warps": 4, "enable_fp_fusion": False}
    )


def four_bits(packed: Tensor, state: object, shape: torch.Size, dtype: torch.dtype, own: Callable) -> Tensor:
    """The weight (N, K) in `dtype`, of bitsandbytes' packed one and its `QuantState`.

    A kind that is new to the device is first compared with what `own` makes: bitsandbytes' result.
    """
    q, absmax = packed.view(torch.uint8).view(-1), (state.state2 if state.nested else state).absmax
    kind = (q.device, dtype, absmax.dtype, state.quant_type, state.blocksize, state.nested and state.state2.blocksize)
    admitted = _admitted.get(kind)
    if admitted is False or (admitted is None and q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return own()
    out = torch.empty(shape, dtype=dtype, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        launch(q, state, out).run()
    if admitted is None:
        want = own()
        _admitted[kind] = torch.equal(out, want)
        if not _admitted[kind]:
            warn_once(
                ("dequantise", kind), f"fastlora: bitsandbytes dequantises on {q.device}: our kernel differs there"
            )
            return want
    return out
