"""Path `onepass`: one forward kernel reads each tile of X once for X·Wᵀ and X·Aᵀ. For small, launch-bound layers."""

from __future__ import annotations

from fastlora.dispatch import triton_common as common
from fastlora.dispatch.problem import rows

NAME = "onepass"
unavailable, unsupported = common.unavailable, common.unsupported
draw, mask, backward, s_factor = common.draw, common.mask, common.backward, common.s_factor


def forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    """x (..., K) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype."""
    from fastlora.kernels import onepass

    x2 = rows(x)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    with common.on_device_of(x):
        _, S = onepass.onepass_forward(
            x2, weight, bias, lora_A, lora_B, common.exact(scaling, dropout_p), common.dropout_of(dropout_p, seed),
            out=y.view(x2.shape[0], weight.shape[0]),
        )  # fmt: skip
    return y, S
