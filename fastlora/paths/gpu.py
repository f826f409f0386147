"""A GPU's paths, of Triton's kernels: `hybrid`, `onepass` and `split`.

| path      | forward                                             | backward                                         |
| --------- | --------------------------------------------------- | ------------------------------------------------ |
| `hybrid`  | S; Y = S Bᵀ + bias; ATen: Y += X Wᵀ                 | dS, dB; dA; dX = keep * (dS A); ATen: dX += dY W |
| `onepass` | Y and S from one read of X                          | dS, dB; dA; one GEMM with the update inside      |
| `split`   | S, then one GEMM with the update in its accumulator | as `onepass`                                     |

With dropout `da` makes the mask anew and leaves it in bits, which dX reads.
"""

from __future__ import annotations

import hashlib
import pathlib
from contextlib import nullcontext
from functools import cache, partial
from importlib import metadata

import torch
from torch import Tensor

from fastlora import env
from fastlora.paths.bank import Bank
from fastlora.paths.path import Path
from fastlora.paths.problem import Problem, Update, check_saved, drawn, drawn_bank, rows

MAX_RANK = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TABLES: dict = {}  # no tile but the tables'


def why_not(device: torch.device, problem: Problem | None) -> str | None:
    reason = _triton_missing()
    if reason is None and device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
            reason = "the GPU is older than compute capability 7.5"
    elif reason is None and device.type == "cpu":
        reason = None if env.interpreting() else "tensors on the CPU need TRITON_INTERPRET=1"
    elif reason is None:
        reason = f"no Triton kernels for device type {device.type!r}"
    if reason or problem is None:
        return reason
    if problem.dtype not in _DTYPES:
        return f"x is {problem.dtype}; the kernels take float16, bfloat16 and float32"
    if problem.adapter_dtype not in (problem.dtype, torch.float32):
        return f"the adapters are {problem.adapter_dtype}; the kernels take x's dtype and float32"
    most = _most_ranks(problem) if problem.bank else MAX_RANK
    if most < problem.R:
        return f"R is {problem.R}; the kernels take at most {most}"
    if problem.empty:
        return "M, N or K is 0: nothing to multiply"
    if device.type == "cpu" and problem.dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    return None


def _most_ranks(problem: Problem) -> int:
    """Of a bank: more than of one adapter, where every kernel has a tile for them that does not spill."""
    from fastlora.kernels import tiles as tables

    target = tables.target_of(problem.device)
    kind = tables.kind_of(problem.dtype, tables.input_precision(problem.dtype, target))
    wide = all(tables.rank_tiles(kernel, target, tables.BANK_RANK, kind) for kernel in tables.BANK_TILES)
    return tables.BANK_RANK if wide else MAX_RANK


@cache
def _triton_missing() -> str | None:
    try:
        import fastlora.kernels.gemm  # noqa: F401 - and with it what is used of triton's inside
    except Exception as error:  # a broken Triton raises more than ImportError
        return f"triton cannot be used ({error})"
    return None


def hybrid_forward(x, weight, bias, update, cut=_TABLES) -> tuple[Tensor, Tensor]:
    from fastlora.kernels import s, up

    update = _laid_update(update)
    x2, y = rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
    y2 = y.view(x2.shape[0], weight.shape[0])
    with _on_device_of(x):
        S = s.s_forward(x2, update.lora_A, _factor(update), _dropout(update), cut.get("s"))
        up.up(S, update.lora_B.t(), bias, None, y2, cut.get("up")).addmm_(x2, weight.t())
    return y, S


def onepass_forward(x, weight, bias, update, cut=_TABLES) -> tuple[Tensor, Tensor]:
    from fastlora.kernels import onepass

    update = _laid_update(update)
    x2, y = rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
    with _on_device_of(x):
        _, S = onepass.onepass_forward(
            x2, weight, bias, update.lora_A, update.lora_B, _factor(update), _dropout(update),
            out=y.view(x2.shape[0], weight.shape[0]), tile=cut.get("onepass"),
        )  # fmt: skip
    return y, S


def split_forward(x, weight, bias, update, cut=_TABLES) -> tuple[Tensor, Tensor]:
    from fastlora.kernels import gemm, s

    update = _laid_update(update)
    x2, y = rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
    with _on_device_of(x):
        S = s.s_forward(x2, update.lora_A, _factor(update), _dropout(update), cut.get("s"))
        y2 = y.view(x2.shape[0], weight.shape[0])
        gemm.gemm_forward(x2, weight, bias, S, update.lora_B, out=y2, tile=cut.get("gemm"))
    return y, S


def hybrid_backward(dy, x, weight, S, update, need_B, cut=_TABLES):
    def to_dx(dy, weight, dS, lora_A, bits):
        from fastlora.kernels import up

        dx = dy.new_empty((dy.shape[0], lora_A.shape[1]))
        return up.up(dS, lora_A, None, bits, dx, cut.get("up")).addmm_(dy, weight)

    return _backward(dy, x, weight, S, update, cut, to_dx)


def split_backward(dy, x, weight, S, update, need_B, cut=_TABLES):
    def to_dx(dy, weight, dS, lora_A, bits):
        from fastlora.kernels import gemm

        return gemm.gemm_dx(dy, weight, dS, lora_A, bits, None, cut.get("gemm_dx"))

    return _backward(dy, x, weight, S, update, cut, to_dx)


def _backward(dy, x, weight, S, update, cut, to_dx):
    from fastlora.kernels import grads
    from fastlora.kernels.dropout import mask_bits, mask_launch

    check_saved(dy, x, weight, S, update)
    dy, update = _laid(dy), _laid_update(update)
    dropout, lora_A = _dropout(update), update.lora_A
    with _on_device_of(dy):
        dS, dB = grads.ds_db(dy, update.lora_B, S, _factor(update), cut.get("ds_db"))
        # dA makes the mask; dX reads an eighth of a byte an element instead of making it again
        drops = dropout is not None and weight is not None
        bits = mask_bits(dy.shape[0], lora_A.shape[1], dy.device) if drops else None
        dA = None if x is None else grads.da(dS, rows(x), dropout, lora_A.dtype, cut.get("da"), bits)
        if drops and x is None:
            mask_launch(dropout, bits).run()
        dx = None if weight is None else to_dx(dy, weight, dS, lora_A, bits)
    return dx, dA, dB


def mask(seed: Tensor, M: int, K: int, p: float | Bank) -> Tensor:
    from fastlora.kernels.dropout import Dropout, keep_mask

    with _on_device_of(seed):
        return keep_mask(Dropout(p, seed), M, K)


def drop(seed: Tensor, p: float | Bank, x: Tensor | None, u: Tensor | None = None) -> Tensor | None:
    """drop(x), a new tensor, and drop(u) in place; either may be None."""
    from fastlora.kernels.dropout import Dropout, dropped

    with _on_device_of(seed):
        return dropped(Dropout(p, seed), x, u)


def s_factor(scaling: float, p: float, device: torch.device) -> float:
    """S holds every factor."""
    return 1.0


def _dropout(update: Update):
    """The kernels' `Dropout`, or None when nothing is dropped."""
    from fastlora.kernels.dropout import Dropout

    return Dropout(update.chance, update.seed) if update.dropout_p > 0.0 else None


def _factor(update: Update) -> float | Bank:
    """What S and dS are multiplied by: the scaling, and dropout's 1 / (1 - p)."""
    if update.bank is not None:
        return update.bank
    return update.scaling / (1.0 - update.dropout_p) if update.dropout_p < 1.0 else 0.0


def _laid(t: Tensor) -> Tensor:
    """t as the kernels were planned and admitted for it: dense, at a multiple of 16 bytes."""
    dense = t.is_contiguous() and t.data_ptr() % 16 == 0
    return t if dense else t.clone(memory_format=torch.contiguous_format)


def _laid_update(update: Update) -> Update:
    return update._replace(lora_A=_laid(update.lora_A), lora_B=_laid(update.lora_B))


def _on_device_of(x: Tensor):
    """A context in which x's GPU is the current one: Triton launches there, wherever its arguments lie."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def fingerprint() -> str:
    """The sources of the kernels, and the compiler's version."""
    digest = hashlib.sha256()
    for source in sorted((pathlib.Path(__file__).parents[1] / "kernels").glob("*.py")):
        digest.update(source.read_bytes())
    return f"{metadata.version('triton')} {digest.hexdigest()}"


def tiles(kernels: tuple[str, ...], problem: Problem) -> dict[str, tuple]:
    """For each of these kernels at most three tiles, the default first; none for one that does not run."""
    from fastlora.kernels import gemm
    from fastlora.kernels import tiles as tables

    target, R = tables.target_of(problem.device), problem.R
    kind = tables.kind_of(problem.dtype, tables.input_precision(problem.dtype, target))
    x, weight, lora_A, lora_B, _, dy = drawn(problem, "meta")
    found = {}
    for kernel in kernels:
        if kernel == "gemm":
            found[kernel] = gemm.candidates(target, x, weight.t(), lora_B.t(), False, dy)
        elif kernel == "gemm_dx":
            found[kernel] = gemm.candidates(target, dy, weight, lora_A, problem.dropout, torch.empty_like(x))
        elif kernel != "ds_db" or tables.ds_db_tile(target, problem.M, problem.N, R, kind, problem.dtype.itemsize):
            knows = problem.bank and (problem.dropout or kernel != "da")
            found[kernel] = tables.rank_tiles(kernel, target, R, kind, knows)
    return found


def launches(path: Path, problem: Problem) -> list:
    """What a call of `path` launches for `problem`, forward with a bias and without, and backward; none of it runs."""
    from fastlora.kernels.launch import planning
    from fastlora.kernels.tiles import target_of

    x, weight, lora_A, lora_B, bias, dy = drawn(problem, "meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if problem.dropout else None
    p = 0.1 if problem.dropout else 0.0
    update = Update(lora_A, lora_B, 1.0 if problem.bank else 2.0, p, seed, drawn_bank(problem, "meta"))
    with planning(target_of(problem.device)) as planned:
        path.forward(x, weight, None, update)
        _, S = path.forward(x, weight, bias, update)
        path.backward(dy, x, weight, S, update, True)
    return planned


def _path(name: str, forward, backward, *kernels: str) -> Path:
    return Path(
        name, why_not, forward, backward, mask, s_factor, (), fingerprint,
        tiles=partial(tiles, kernels), launches=launches,
    )  # fmt: skip


HYBRID = _path("hybrid", hybrid_forward, hybrid_backward, "s", "up", "ds_db", "da")
ONEPASS = _path("onepass", onepass_forward, split_backward, "onepass", "ds_db", "da", "gemm_dx")
SPLIT = _path("split", split_forward, split_backward, "s", "gemm", "ds_db", "da", "gemm_dx")
