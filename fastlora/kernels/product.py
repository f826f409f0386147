"""The operands of float32 products in tf32: a tensor core cuts them off, ATen's products round them to nearest."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(t, INPUT_PRECISION: tl.constexpr):
    """t as an operand of `tl.dot` in that precision: for "tf32" rounded to nearest, ties away from zero."""
    if INPUT_PRECISION == "tf32":
        t = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [t], dtype=t.dtype, is_pure=True, pack=1)
    return t
