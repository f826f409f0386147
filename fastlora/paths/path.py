"""`Path`: what the rest of the package knows of a way to compute the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from fastlora.paths.problem import Problem, Update


@dataclass(frozen=True)
class Path:
    """One way to compute the layer.

    Attributes:
        name: as users write it.
        why_not: (device, problem) -> why the path cannot run there, or None; without a problem: on the device at all.
        forward: (x (..., K), weight (N, K), bias, update) -> y (..., N), a fresh tensor, and S (M, R) in x's dtype.
        backward: (dy (M, N), x, weight, S, update, need_B) -> dx (M, K), dA (R, K), dB (N, R). No dA where x is None,
            no dx where weight is None; dB may be None unless `need_B`.
        mask: (seed, M, K, p) -> the dropout mask, bool (M, K), True = kept.
        s_factor: (scaling, p, device) -> what dYᵀ·S is multiplied by to be dB; it depends on which factors S holds.
        cases: what the self-check adds to its own cases, as (M, N, K, R, dropout_p, dtype, adapter_dtype).
        fingerprint: what, beside device and versions, a verdict of the self-check holds for. None: the path is trusted
            without one.
        why_slow: problem -> why the path, though it can run, is left unless asked for; None where it is known to be the
            fastest. A path without this function is left until it has been measured.
        tiles: problem -> for each kernel the tiles to try, the default first.
        launches: (path, problem) -> the launches of Triton kernels that a call makes, none of them run.
        cut: the tiles that `with_tiles` chose, by kernel; other kernels cut as their tables say.
        whole: the path of PATHS of which `with_tiles` made this one.
    """

    name: str
    why_not: Callable[[torch.device, Problem | None], str | None]
    forward: Callable[[Tensor, Tensor, Tensor | None, Update], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    mask: Callable[[Tensor, int, int, float], Tensor]
    s_factor: Callable[[float, float, torch.device], float]
    cases: tuple[tuple, ...] = ()
    fingerprint: Callable[[], str] | None = None
    why_slow: Callable[[Problem], str | None] | None = None
    tiles: Callable[[Problem], dict[str, tuple]] | None = None
    launches: Callable[[Path, Problem], list] | None = None
    cut: tuple[tuple[str, object], ...] = ()

    whole: Path | None = None

    def with_tiles(self, cut: Mapping[str, object]) -> Path:
        """This path, its kernels cut by these tiles; the same object for the same tiles."""
        cut = dict(self.cut) | dict(cut)
        return _cut(self.whole or self, tuple(sorted(cut.items()))) if cut else self

    @property
    def label(self) -> str:
        """The name, and the tiles that are not the tables'."""
        return " ".join([self.name, *(f"{kernel}={tile}" for kernel, tile in self.cut)])


@cache
def _cut(path: Path, cut: tuple[tuple[str, object], ...]) -> Path:
    how = {"forward": partial(path.forward, cut=dict(cut)), "backward": partial(path.backward, cut=dict(cut))}
    return replace(path, cut=cut, whole=path, **how)
