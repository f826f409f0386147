"""The self-check of projections that share x on a GPU: `check`, for the kernels that compute them together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from fastlora import accuracy, autograd, check
from fastlora.paths import Path
from fastlora.paths.problem import Problem, Update, draw_seeds, drawn
from fastlora.paths.shared import Needs, Projection, Shared


def admit(path: Path, shared: Shared, problems: Sequence[Problem], needs: Needs, only_known: bool) -> str | None:
    """Whether `path` may compute projections that share x together, with a backward of what `needs` asks for: None, or
    why not, as `admit` says it of one.

    only_known: nothing may be compiled or run to find out.
    """
    problems, device = tuple(problems), problems[0].device
    subject, reason = _subject(shared, problems, needs)
    if reason is not None:
        return reason
    if only_known and (path.name, check.indexed(device), subject) not in check._verdicts:
        return "its self-check has not run yet"
    return check._verdict(path, device, subject, lambda: check.apart(device, _fault, path, shared, problems, needs))


@lru_cache(4096)  # planning takes milliseconds, and every call that the node leaves asks
def _subject(shared: Shared, problems: tuple[Problem, ...], needs: Needs) -> tuple[str, str | None]:
    """What the verdict is about, and why it cannot be planned."""
    try:
        kernels = _kernels(shared, problems, needs)
    except Exception as error:
        return "", check._said(error)
    card = [problem._replace(M=0, device=problem.device.type) for problem in problems]
    return hashlib.sha256(repr((card, sorted(kernels))).encode()).hexdigest()[:32], None


def _kernels(shared: Shared, problems: Sequence[Problem], needs: Needs) -> frozenset[str]:
    from fastlora.kernels.launch import planning
    from fastlora.kernels.tiles import target_of

    target = target_of(problems[0].device)
    with planning(target) as planned:
        x, many, dys = _drawn(problems, "meta")
        for bias in (True, False):
            each = [one if bias else one._replace(bias=None) for one in many]
            _, Ss = shared.forward(x, each)
        if needs.x or any(needs.A) or any(needs.B):
            shared.backward(dys, x, many, Ss, needs)
    return frozenset(f"{one.key(target)} {one.turns > 1}" for one in planned)


def _drawn(problems: Sequence[Problem], device=None) -> tuple[Tensor, list[Projection], list[Tensor]]:
    many, dys = [], []
    for problem in problems:
        x, weight, lora_A, lora_B, bias, dy = drawn(problem, device)
        seed = torch.zeros((), dtype=torch.int64, device=x.device) if problem.dropout else None
        many.append(Projection(weight, bias, Update(lora_A, lora_B, 2.0, 0.1 if problem.dropout else 0.0, seed)))
        dys.append(dy)
    return x, many, dys


def _fault(path: Path, shared: Shared, problems: Sequence[Problem], needs: Needs) -> str | None:
    M, odd, few, kernels = problems[0].M, problems[0].M % 16, check.ROWS, _kernels(shared, problems, needs)
    while few + odd < M and _kernels(shared, [one._replace(M=few + odd) for one in problems], needs) != kernels:
        few *= 2
    x, many, dys = _drawn([one._replace(M=min(few + odd, M)) for one in problems])
    for bias in (True, False):
        torch.manual_seed(0)
        inputs = [
            accuracy.Inputs(x, w, u.lora_A, u.lora_B, b if bias else None, dy, u.scaling, u.dropout_p)
            for (w, b, u), dy in zip(many, dys, strict=True)
        ]
        if problems[0].dropout:
            masks = [path.mask(seed, *x.shape, 0.1) for seed in draw_seeds(x.device, len(many))]
            inputs = [replace(one, mask=mask) for one, mask in zip(inputs, masks, strict=True)]
        torch.manual_seed(0)
        found = accuracy.shared_violations(partial(autograd.run_together, path), inputs, needs=needs)
        if found:
            return f"projections that share x: {found[0]}"
    return None
