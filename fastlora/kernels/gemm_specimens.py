"""The GEMM's launches for the compile matrix: each tile of its tables, through the launcher's own planning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from fastlora.kernels import gemm
from fastlora.kernels.dropout import Dropout
from fastlora.kernels.gemm_tiles import row_of, tiles_of, tma_holds
from fastlora.kernels.specimen import Pointer, Specimen
from fastlora.kernels.tiles import Target, Tile

RANKS = (16, 128)
# Sizes by layout: whole tiles; a K that ends within a tile; whole 16-byte rows and no more; nothing of the sort.
SIZES = {"aligned": 4096, "uneven": 4112, "rows": 4104, "ragged": 4097}
SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def specimen(
    target: Target, tile: Tile, kind: str, dropout: bool, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype,
    layout: str, precision: str = "ieee",
) -> Specimen:  # fmt: skip
    """The launch of one kind, rank, pair of types and layout with `tile`."""
    size = SIZES[layout]
    aligned = layout != "ragged"
    tensor, adapter = Pointer(dtype, aligned), Pointer(adapter_dtype, aligned)
    w, u = ((1, size), (1, R)) if kind == "forward" else ((size, 1), (size, 1))
    bias = tensor if kind == "forward" else None
    strides = (size, 1, *w, int(bias is not None), R, 1, *u)
    plan = gemm.make_plan(
        target, 128, kind, dtype, 2 * size, size, size, R, strides, 0 if aligned else dtype.itemsize,
        bias is not None, dropout, precision, tile,
    )  # fmt: skip
    drawn = Dropout(0.1, Pointer(torch.int64)) if dropout else None
    positional = gemm.arguments(plan, tensor, tensor, bias, tensor, adapter, tensor, drawn)
    constants = {name: value for name, value in plan.constants.items() if name not in tile.options}
    args = dict(zip(plan.kernel.arg_names, positional, strict=False)) | constants
    label = f"{kind}{' dropout' if dropout else ''} r{R} {SHORT[dtype]}/{SHORT[adapter_dtype]} {layout}"
    wgmma = tile.tma and target.arch == 90
    return Specimen(label + (" tf32" if precision == "tf32" else ""), plan.kernel, target, tile, args, wgmma=wgmma)


def gemm_specimens(
    target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype, aligned: bool
) -> Iterator[Specimen]:
    """Every launch of the GEMM on `target` with these types: all rows of its table that they reach, all kinds."""
    tf32 = dtype == torch.float32 and target.backend == "cuda" and int(target.arch) >= 80
    for precision in ("ieee", "tf32") if tf32 else ("ieee",):
        for tma in (True, False):
            layouts = ("aligned" if aligned else "rows",) if tma else ("aligned", "uneven") if aligned else ("ragged",)
            for kind, dropout in (("forward", False), ("dx", False), ("dx", True)):
                row = row_of(dtype, precision, aligned, dropout, tma)
                if tma and not row.startswith("tma"):
                    continue
                for R, layout in itertools.product(RANKS, layouts):
                    if tma and not tma_holds(aligned, dropout, R):
                        continue
                    for tile in tiles_of(target, row, R):
                        yield specimen(target, tile, kind, dropout, R, dtype, adapter_dtype, layout, precision)


SPECIMENS = [gemm_specimens]
