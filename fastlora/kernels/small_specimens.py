"""The launches of the rank-R kernels for the compile matrix: each tile of their tables, as launched."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlora.kernels.dropout import keep_mask_kernel
from fastlora.kernels.grads import da_kernel, ds_db_kernel
from fastlora.kernels.onepass import onepass_kernel
from fastlora.kernels.partials import BLOCK, BLOCK_P, sum_kernel, sum_pair_kernel
from fastlora.kernels.s import s_kernel
from fastlora.kernels.specimen import Pointer, Specimen
from fastlora.kernels.tiles import Target, Tile, padded_rank
from fastlora.kernels.tiles_small import da_cut, ds_db_cut, kind_of, onepass_tile, s_cut

SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
SEED = Pointer(torch.int64)
PARTIAL = Pointer(torch.float32)


def _precisions(target: Target, dtype: torch.dtype) -> tuple[str, ...]:
    tf32 = dtype == torch.float32 and target.backend == "cuda" and int(target.arch) >= 80
    return ("ieee", "tf32") if tf32 else ("ieee",)


def _label(kernel: str, R: int, dtype, adapter_dtype, aligned: bool, dropout: bool, precision: str) -> str:
    words = [kernel, *(["dropout"] * dropout), f"r{R}", f"{SHORT[dtype]}/{SHORT[adapter_dtype]}"]
    return " ".join([*words, "aligned" if aligned else "ragged", *(["tf32"] if precision == "tf32" else [])])


def _size(aligned: bool) -> int:
    return 4096 if aligned else 4097


def s_specimens(target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool) -> Iterator[Specimen]:
    n, x, adapter = _size(aligned), Pointer(dtype, aligned), Pointer(adapter_dtype, aligned)
    for precision in _precisions(target, dtype):
        for R in (32, 128):
            tile, _, split_k = s_cut(target, n, n, R, kind_of(dtype, precision))
            for dropout in (True, False):
                args = {
                    "x_ptr": x, "a_ptr": adapter, "out_ptr": x, "seed_ptr": SEED if dropout else x,
                    "scaling": 2.0, "threshold": 6554, "M": n, "K": n, "stride_xm": n, "stride_xk": 1,
                    "stride_ar": n, "stride_ak": 1, "split_k": split_k,
                    "R": R, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": padded_rank(R),
                    "SCALING_POINTER": False, "DROPOUT": dropout, "INPUT_PRECISION": precision,
                }  # fmt: skip
                label = _label("S", R, dtype, adapter_dtype, aligned, dropout, precision)
                yield Specimen(label, s_kernel, target, tile, args)


def ds_db_specimens(
    target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool
) -> Iterator[Specimen]:
    n, x, adapter = _size(aligned), Pointer(dtype, aligned), Pointer(adapter_dtype, aligned)
    for precision in _precisions(target, dtype):
        for R in (16, 32):
            cut = ds_db_cut(target, n, 16, R, kind_of(dtype, precision))  # one region wide: whatever the table has
            if cut is None:
                continue
            tile, region_m = cut
            args = {
                "dy_ptr": x, "b_ptr": adapter, "s_ptr": x, "ds_ptr": PARTIAL, "db_ptr": PARTIAL, "scaling": 2.0,
                "M": n, "N": n, "stride_ym": n, "stride_yn": 1, "stride_bn": R, "stride_br": 1, "region_m": region_m,
                "R": R, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": padded_rank(R),
                "SCALING_POINTER": False, "INPUT_PRECISION": precision,
            }  # fmt: skip
            label = _label("dS dB", R, dtype, adapter_dtype, aligned, False, precision)
            yield Specimen(label, ds_db_kernel, target, tile, args)


def da_specimens(target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool) -> Iterator[Specimen]:
    if adapter_dtype != dtype:
        return  # the kernel reads no adapter
    n, x = _size(aligned), Pointer(dtype, aligned)
    for precision in _precisions(target, dtype):
        for R in (32, 128):
            tile, _, split_m = da_cut(target, n, n, R, kind_of(dtype, precision))
            for dropout in (True, False):
                args = {
                    "ds_ptr": x, "x_ptr": x, "da_ptr": PARTIAL, "seed_ptr": SEED if dropout else x, "threshold": 6554,
                    "M": n, "K": n, "stride_sm": R, "stride_sr": 1, "stride_xm": n, "stride_xk": 1, "split_m": split_m,
                    "stride_dr": n if dropout else 1, "stride_dk": 1 if dropout else R,
                    "R": R, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": padded_rank(R),
                    "DROPOUT": dropout, "INPUT_PRECISION": precision,
                }  # fmt: skip
                label = _label("dA" if dropout else "dB", R, dtype, adapter_dtype, aligned, dropout, precision)
                yield Specimen(label, da_kernel, target, tile, args)


def onepass_specimens(
    target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool
) -> Iterator[Specimen]:
    n, x, adapter = _size(aligned), Pointer(dtype, aligned), Pointer(adapter_dtype, aligned)
    for precision in _precisions(target, dtype):
        for R in (32, 128):
            tile = onepass_tile(target, n, n, n, R, kind_of(dtype, precision))
            for dropout in (True, False):
                args = {
                    "x_ptr": x, "w_ptr": x, "bias_ptr": x, "a_ptr": adapter, "b_ptr": adapter, "y_ptr": x, "s_ptr": x,
                    "seed_ptr": SEED if dropout else x, "scaling": 2.0, "threshold": 6554, "M": n, "N": n, "K": n,
                    "stride_xm": n, "stride_xk": 1, "stride_wn": n, "stride_wk": 1, "stride_bias": 1,
                    "stride_ar": n, "stride_ak": 1, "stride_bn": R, "stride_br": 1,
                    "R": R, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                    "BLOCK_R": padded_rank(R), "HAS_BIAS": True, "SCALING_POINTER": False, "DROPOUT": dropout,
                    "INPUT_PRECISION": precision,
                }  # fmt: skip
                label = _label("onepass", R, dtype, adapter_dtype, aligned, dropout, precision)
                yield Specimen(label, onepass_kernel, target, tile, args)


def rest_specimens(target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool) -> Iterator[Specimen]:
    """The sums of partials, and the mask by itself."""
    n, tile = 16 * _size(aligned), Tile(0, 0, 0, 4, 3)
    blocks = {"BLOCK": BLOCK, "BLOCK_P": BLOCK_P}
    x, adapter = Pointer(dtype), Pointer(adapter_dtype)
    pair = {
        "partials0_ptr": PARTIAL,
        "out0_ptr": x,
        "P0": 8,
        "size0": n,
        "partials1_ptr": PARTIAL,
        "out1_ptr": adapter,
        "P1": 9,
        "size1": n,
    }
    words = f"{SHORT[dtype]}/{SHORT[adapter_dtype]}"
    yield Specimen(f"sum of two {words}", sum_pair_kernel, target, tile, pair | blocks)
    if adapter_dtype != dtype or not aligned:
        return
    yield Specimen(
        f"sum {words}", sum_kernel, target, tile, {"partials_ptr": PARTIAL, "out_ptr": x, "P": 8, "size": n} | blocks
    )
    mask = {"out_ptr": Pointer(torch.int8), "seed_ptr": SEED, "threshold": 6554, "M": n, "K": n, "stride_om": n}
    yield Specimen("mask", keep_mask_kernel, target, tile, mask | {"BLOCK_M": 32, "BLOCK_K": 128})


SPECIMENS = [s_specimens, ds_db_specimens, da_specimens, onepass_specimens, rest_specimens]
