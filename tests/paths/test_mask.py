"""Dropout masks, each against the 16 random bits of every element: exact, at the threshold and at both ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlora.paths import cpu, mask

SEED, M, K = 0x1234_5678_9ABC_DEF0, 1024, 1026
P = [1e-6, 1 / 65536, 0.3, 65535 / 65536, 1.0]  # at 1e-6 no 16 bits are too low, at 1 none are high enough


def philox_bits() -> np.ndarray:
    """Philox-4x32-7 of (seed, row, column // 8) by its definition (Salmon et al. 2011): eight halves a counter."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.zeros((M, -(-K // 8)), np.uint64) for _ in range(4)]
    c[0] += np.arange(c[0].shape[1], dtype=np.uint64)
    c[1] += np.arange(M, dtype=np.uint64)[:, None]
    key = [SEED & 0xFFFFFFFF, SEED >> 32]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = map(np.uint64, key)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = [half for word in (c[0], c[2], c[1], c[3]) for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, -1).reshape(M, -1)[:, :K].astype(np.int64)


def hash_bits() -> np.ndarray:
    """The hash of csrc/cpu_kernels.h: splitmix64 of the row, then two rounds over the column."""
    with np.errstate(over="ignore"):
        z = np.uint64(SEED) + np.uint64(0x9E3779B97F4A7C15) * (np.arange(M, dtype=np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        first, second = z.astype(np.uint32)[:, None], (z >> np.uint64(32)).astype(np.uint32)[:, None]
        column = np.arange(K, dtype=np.uint32)
        h = (column // 32 * 16 + column % 16).astype(np.uint32) * np.uint32(0x9E3779B9) + first
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
        h = ((h ^ second) ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        h ^= h >> np.uint32(16)
    return np.where(column % 32 < 16, h & np.uint32(0xFFFF), h >> np.uint32(16)).astype(np.int64)


def generator_bits() -> np.ndarray:
    """What torch's generator draws, in the order in which it is laid out."""
    words = torch.empty((M * K + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(SEED))
    return words.view(torch.int16)[: M * K].view(M, K).numpy().astype(np.int64) + 32768


MASKS = {
    "philox": (mask.philox_mask, philox_bits),
    "generator": (mask.keep_mask, generator_bits),
    "hash": (cpu.mask, hash_bits),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_element_is_kept_when_its_16_bits_reach_p(name):
    if name == "hash" and cpu.why_not(torch.device("cpu"), None):
        pytest.skip("path 'cpu' does not run here")
    make, bits = MASKS[name]
    bits = torch.from_numpy(bits())
    values = bits.unique()
    assert len(values) == 65536  # so that each of them meets each threshold
    for p in P:
        kept = make(torch.tensor(SEED), M, K, p).bool()
        least = round(p * 65536)
        assert torch.equal(kept, bits >= least)
        assert bits[kept].unique().numel() == 65536 - least


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_statistics(p):
    keep = mask.keep_mask(torch.tensor(12345), 1000, 1000, p, torch.float32)
    kept = 65536 - round(p * 65536)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    sigma = (p * (1 - p) / 1e6) ** 0.5
    assert abs(keep.mean().item() - kept / 65536) < 5 * sigma
    for axis in (0, 1):  # no row or column stands out: 5 sigma over 1000 of them
        assert (keep.mean(axis) - kept / 65536).abs().max().item() < 5.5 * (p * (1 - p) / 1000) ** 0.5
