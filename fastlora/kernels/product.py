"""Products, in tf32 of operands that are rounded to it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(t, INPUT_PRECISION: tl.constexpr):
    """t to the nearest tf32 where products are such: tensor cores cut off the bits that tf32 has not."""
    if INPUT_PRECISION == "tf32":
        t = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [t], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    return t


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b, float32; acc may be None."""
    return tl.dot(
        rounded(a, INPUT_PRECISION), rounded(b, INPUT_PRECISION), acc, input_precision=INPUT_PRECISION
    )  # fmt: skip
