"""Path `split`: the S kernel, then one GEMM whose K loop runs over (X, W) and once over (S, B). For large shapes."""

from __future__ import annotations

from fastlora.dispatch import triton_common as common
from fastlora.dispatch.problem import rows

NAME = "split"
unavailable, unsupported = common.unavailable, common.unsupported
draw, mask, backward, s_factor = common.draw, common.mask, common.backward, common.s_factor


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """x (..., K) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype."""
    from fastlora.kernels import gemm, s

    x2 = rows(x)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    with common.on_device_of(x):
        S = s.s_forward(x2, lora_A, common.exact(scaling, dropout_p), common.dropout_of(dropout_p, seed))
        gemm.gemm_forward(x2, weight, bias, S, lora_B, out=y.view(S.shape[0], weight.shape[0]))
    return y, S
