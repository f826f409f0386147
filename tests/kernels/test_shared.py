"""The kernels of projections that share x, against the error rule and against those of one."""

from __future__ import annotations

import itertools

import pytest
import torch
from judge import DTYPES, draw, judge, paired

from fastlora import autograd, check_shared
from fastlora.kernels import shared
from fastlora.kernels.dropout import Dropout, keep_mask
from fastlora.kernels.tiles import INTERPRETER, TARGETS
from fastlora.paths import PATHS
from fastlora.paths.problem import Problem
from fastlora.paths.shared import SHARED, Needs

pytestmark = pytest.mark.usefixtures("poisoned")

RANKS = [(3,), (8, 16), (16, 5, 9), (20, 32), (3, 40, 8, 8), (128, 16)]  # one launch, then several
M, K = 70, 90


def given(ranks, dtype, adapter_dtype, p):
    x = draw(M, K, dtype=dtype, seed=0)
    As = [draw(R, K, dtype=adapter_dtype, seed=1 + i) for i, R in enumerate(ranks)]
    dropouts = [Dropout(p, torch.tensor([2**40 + i])) if p else None for i in range(len(ranks))]
    masks = [keep_mask(one, M, K) if one else 1 for one in dropouts]
    return x, As, dropouts, masks


KINDS = [*((dtype, dtype) for dtype in DTYPES), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("ranks", "kind", "p"), paired(RANKS, KINDS, [0.0, 0.3]))
def test_S_of_each(ranks, kind, p):
    dtype, adapter_dtype = kind
    x, As, dropouts, masks = given(ranks, dtype, adapter_dtype, p)
    scalings = [1.5 + i for i in range(len(ranks))]
    Ss = shared.s_shared(x, As, scalings, dropouts)
    for S, A, scaling, mask in zip(Ss, As, scalings, masks, strict=True):
        judge(S, lambda x, A, mask=mask, scaling=scaling: scaling * (x * mask) @ A.T, x, A, dtype=dtype)


ASKED = [(0.0, "all"), (0.3, "all"), (0.0, "dx"), (0.3, "dA"), (0.3, "last dA and dx")]
SOME = [(16, 5, 9), (3, 40, 8, 8), (128, 16)]


@pytest.mark.parametrize(
    ("asked", "ranks", "kind"),
    [(asked, ranks, KINDS[(i + j) % 3]) for i, asked in enumerate(ASKED) for j, ranks in enumerate(SOME)],
)
def test_dA_of_each_and_their_dx(asked, ranks, kind):
    (p, wanted), (dtype, adapter_dtype) = asked, kind
    x, As, dropouts, masks = given(ranks, dtype, adapter_dtype, p)
    dSs = [draw(M, R, dtype=dtype, seed=30 + i) for i, R in enumerate(ranks)]
    need = {"dx": [False] * len(ranks), "last dA and dx": [False] * (len(ranks) - 1) + [True]}.get(wanted)
    need = need or [True] * len(ranks)
    dx = None if wanted == "dA" else torch.empty(M, K, dtype=dtype)
    dAs = shared.da_dx_shared(dSs, x if any(need) else None, As, dropouts, need, dx)
    for dA, dS, A, mask, asked in zip(dAs, dSs, As, masks, need, strict=True):
        assert (dA is not None) is asked
        if asked:
            assert dA.dtype is A.dtype
            judge(dA, lambda dS, x, mask=mask: dS.T @ (x * mask), dS, x, dtype=dtype)
    if dx is not None:  # what several launches make is rounded by each

        def total(*pairs):
            each = zip(pairs[::2], pairs[1::2], masks, strict=True)
            return sum((dS @ A) * mask for dS, A, mask in each)

        judge(dx, total, *(t for pair in zip(dSs, As, strict=True) for t in pair), dtype=dtype)


def test_chunks_hold_what_fits_the_registers():
    limits = {"hip": 1, 75: 32}
    for target, ranks in itertools.product([*TARGETS, INTERPRETER], [*RANKS, (16,) * 7, (32, 32, 1), (1,)]):
        limit = limits.get(target.backend, limits.get(target.arch, 64))
        found = shared.chunks(ranks, target)
        assert [r for one in found for r in ranks[one]] == list(ranks)
        for one in found:
            each = max(16, *(1 << (r - 1).bit_length() for r in ranks[one])) * len(ranks[one])
            assert len(ranks[one]) == 1 or (len(ranks[one]) <= 3 and each <= limit)


def test_an_infinity_stays_in_its_row():
    x, As, dropouts, _ = given((16, 5, 9), torch.float32, torch.float32, 0.0)
    x[3, 7] = float("inf")
    for S in shared.s_shared(x, As, [1.0] * 3, dropouts):
        assert not S[3].isfinite().any() and S[:3].isfinite().all() and S[4:].isfinite().all()


def test_x_is_read_by_one_launch():
    x, As, dropouts, _ = given((16, 5, 9), torch.float16, torch.float16, 0.3)
    S = [torch.empty(M, A.shape[0], dtype=x.dtype) for A in As]
    launches = shared.s_shared_launches(INTERPRETER, x, As, [1.0] * 3, dropouts, S)
    assert sum(one.args.get("x_ptr") is x for one in launches) == 1
    dx = torch.empty(M, K, dtype=x.dtype)
    launches = shared.da_dx_shared_launches(INTERPRETER, S, x, As, dropouts, As, dx)
    assert sum(one.args.get("x_ptr") is x for one in launches) == 1


@pytest.mark.parametrize("path", ["hybrid", "split"])  # `onepass` is as `split`
@pytest.mark.parametrize("dropout", [False, True])
def test_the_self_check_finds_what_is_wrong(path, dropout, monkeypatch):
    cpu, kind = torch.device("cpu"), torch.float32
    problems = [Problem(40, N, 48, R, kind, kind, cpu, dropout) for N, R in ((24, 8), (16, 4), (16, 20))]
    monkeypatch.setattr(check_shared, "_kernels", lambda *_: frozenset())  # which only a compiler can name
    for module in (autograd, check_shared):  # as on a GPU, all in one draw
        monkeypatch.setattr(module, "draw_seeds", lambda _, n: list(torch.randint(2**63 - 1, (n, 2))[:, 0]))
    every = Needs(True, (True,) * 3, (True,) * 3)
    some = Needs(False, (True, False, True), (True,) * 3)
    for needs in (every, some, Needs(False, *((False,) * 3,) * 2)):
        assert check_shared._fault(PATHS[path], SHARED[path], problems, needs) is None
    right = SHARED[path]

    def wrong(x, many):
        ys, Ss = right.forward(x, many)
        return [*ys[:2], ys[2] * 1.01], Ss

    monkeypatch.setitem(SHARED, path, right._replace(forward=wrong))
    assert "Y: error" in check_shared._fault(PATHS[path], SHARED[path], problems, every)
    dropped = right._replace(backward=lambda dys, x, many, Ss, needs: right.backward(dys, x * 1.01, many, Ss, needs))
    monkeypatch.setitem(SHARED, path, dropped)
    assert "dA: error" in check_shared._fault(PATHS[path], SHARED[path], problems, every)

    def unasked(dys, x, many, Ss, needs):
        dx, dAs, dBs = right.backward(dys, x, many, Ss, needs)
        return dx, [A if A is None or needs.x else A * 1.01 for A in dAs], dBs

    monkeypatch.setitem(SHARED, path, right._replace(backward=unasked))
    assert check_shared._fault(PATHS[path], SHARED[path], problems, every) is None
    assert "dA: error" in check_shared._fault(PATHS[path], SHARED[path], problems, some)
