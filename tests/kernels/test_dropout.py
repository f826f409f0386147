"""The dropout mask: what it is a function of, and its statistics."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels.dropout import Dropout, dropped, keep_mask
from fastlora.paths import mask
from fastlora.paths.mask import philox_mask


def seeded(p, seed=1234):
    return Dropout(p, torch.tensor([seed]))


def philox(seed, column, row, rounds=7):
    """Philox-4x32 by its definition (Salmon et al. 2011): four words for the counter (column, row, 0, 0)."""
    c, key, word = [column, row, 0, 0], [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b & word, (a >> 32) ^ c[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c


def test_is_philox_of_seed_row_and_column():
    seed, p = 0x1234_5678_9ABC_DEF0, 0.4
    mask = keep_mask(seeded(p, seed), 9, 40)
    for row in (0, 3, 8):
        for eighth in range(5):
            words = philox(seed, eighth, row)
            halves = sorted([w & 0xFFFF for w in words] + [w >> 16 for w in words])
            kept = sum(half >= round(p * 65536) for half in halves)
            assert int(mask[row, 8 * eighth : 8 * eighth + 8].sum()) == kept


@pytest.mark.parametrize("block_m, block_k", [(16, 8), (16, 64), (64, 16), (128, 256)])
def test_no_tile_enters(block_m, block_k):
    dropout = seeded(0.3)
    assert torch.equal(keep_mask(dropout, 40, 140, block_m, block_k), keep_mask(dropout, 40, 140))


def test_a_larger_matrix_begins_with_the_smaller():
    dropout = seeded(0.5)
    assert torch.equal(keep_mask(dropout, 90, 200)[:33, :57], keep_mask(dropout, 33, 57))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mean(p):
    M, K = 512, 512
    mask = keep_mask(seeded(p), M, K, 256, 512).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean().item() - (1 - p)) < 4 * deviation / (M * K) ** 0.5
    assert (mask.mean(0) - (1 - p)).abs().max() < 5.5 * deviation / M**0.5
    assert (mask.mean(1) - (1 - p)).abs().max() < 5.5 * deviation / K**0.5


def test_neighbours_seeds_and_places_are_independent():
    M, K = 256, 512
    mask = keep_mask(seeded(0.5), M, K, 256, 512).double() * 2 - 1
    limit = 5 / (M * K) ** 0.5
    for shift in [(0, s) for s in range(1, 17)] + [(1, 0), (2, 0), (1, 1), (16, 8), (32, 128)]:
        other = torch.roll(mask, shift, (0, 1))
        assert abs((mask * other).mean().item()) < limit, shift
    for seed in (1235, 1234 + (1 << 32), -1234):
        other = keep_mask(seeded(0.5, seed), M, K, 256, 512).double() * 2 - 1
        assert abs((mask * other).mean().item()) < limit, seed
    eighths = mask.view(M, K // 8, 8).flatten(0, 1)
    together = eighths.T @ eighths / len(eighths) - torch.eye(8, dtype=torch.double)
    assert together.abs().max() < 5 / len(eighths) ** 0.5


def test_p_zero_keeps_all_and_p_one_none():
    assert keep_mask(seeded(0.0), 20, 20).all()
    assert not keep_mask(seeded(1.0), 20, 20).any()


def test_seed_is_read_when_the_kernel_runs():
    seed = torch.tensor([5])
    dropout = Dropout(0.5, seed)
    first = keep_mask(dropout, 16, 64)
    seed.fill_(6)
    assert not torch.equal(first, keep_mask(dropout, 16, 64))
    assert torch.equal(keep_mask(dropout, 16, 64), keep_mask(seeded(0.5, 6), 16, 64))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_atens_operations_make_the_same_mask(p):
    seed = torch.tensor(-0x1234_5678_9ABC_DEF0)
    assert torch.equal(philox_mask(seed, 37, 77, p), keep_mask(Dropout(p, seed), 37, 77))


@pytest.mark.parametrize("p", [1e-6, 1 / 65536, 0.3, 0.5, 65535 / 65536, 1.0])
def test_the_threshold_is_met_to_the_bit(p):
    """Where ATen's operations put it: `tests/paths/test_mask.py` holds those against every value of 16 bits."""
    seed = torch.tensor(77)
    assert torch.equal(keep_mask(Dropout(p, seed), 256, 2048, 128, 1024), philox_mask(seed, 256, 2048, p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("lies", ["rows", "columns", "apart"])
def test_two_matrices_are_dropped_by_the_mask(dtype, p, lies):
    dropout, (x, u) = seeded(p), torch.randn(2, 37, 77).to(dtype)
    keep = keep_mask(dropout, 37, 77)
    x = {"rows": x, "columns": x.t().contiguous().t(), "apart": torch.stack([x, x], -1)[..., 0]}[lies]
    for with_x, with_u in ((True, True), (True, False), (False, True)):
        second = u.clone() if with_u else None
        first = dropped(dropout, x if with_x else None, second)
        for got, given in ((first, x), (second, u)):
            assert got is None or torch.equal(got, given.where(keep, 0.0))
        assert (first is not None) is with_x


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
def test_path_torch_takes_the_kernels_that_agree_with_atens_mask(dtype, right, monkeypatch):
    monkeypatch.setattr(mask, "_agrees", {})
    if not right:
        monkeypatch.setattr(mask, "philox_mask", lambda *a: ~philox_mask(*a))
    assert mask._kernel_agrees(torch.device("cpu"), dtype) is right
