"""Path `split`: the S kernel, then one GEMM whose K loop runs over (X, W) and once over (S, B). For large shapes."""

from __future__ import annotations

from fastlora.dispatch.triton_common import (
    backward,
    draw,
    dropout_of,
    exact,
    on_device_of,
    rows,
    s_factor,
    unavailable,
    unsupported,
)

__all__ = ["NAME", "backward", "draw", "forward", "s_factor", "unavailable", "unsupported"]

NAME = "split"


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """x (..., K) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype."""
    from fastlora.kernels import gemm, s

    x2 = rows(x)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    with on_device_of(x):
        S = s.s_forward(x2, lora_A, exact(scaling, dropout_p), dropout_of(dropout_p, seed))
        gemm.gemm_forward(x2, weight, bias, S, lora_B, out=y.view(S.shape[0], weight.shape[0]))
    return y, S
