"""A kernel launch written down without a GPU, so that the compile matrix can compile what a launcher would launch.

The files of specimens offer `SPECIMENS`, functions `(target, dtype, adapter_dtype, aligned) -> Iterable[Specimen]`: one
specimen for each tile that the launcher can choose there. `args` are the launch arguments by name: `Pointer` for a
tensor, plain numbers for sizes and strides, and the constexprs. From these Triton's binder derives the signature, the
attributes (divisible by 16, equal to 1) and the constants, as at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.kernels.tiles import Target, Tile


class Pointer:
    """Stands for a tensor in a specimen: a dtype, and an address that is 16-byte aligned or is not."""

    def __init__(self, dtype: torch.dtype, aligned: bool = True) -> None:
        self.dtype = dtype
        self._address = 256 if aligned else 256 + dtype.itemsize

    def data_ptr(self) -> int:
        return self._address


@dataclass(frozen=True)
class Specimen:
    """One launch: `fn` with `args` by name on `target`; `label` says which kernel, dtype and alignment it is.

    `wgmma` claims that the sm_90 code multiplies with warp-group instructions.
    """

    label: str
    fn: Any
    target: Target
    tile: Tile
    args: dict[str, Any] = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    wgmma: bool = False
