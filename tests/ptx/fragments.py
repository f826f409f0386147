"""Matrix instructions of one warp or warp group: fragments to matrices and back, by the figures of the PTX ISA.

Products of bf16, f16 and tf32 are exact; a dot product is summed in float64 and rounded once to float32. Tensor cores
truncate while they align the terms, so a GPU's last bits differ; the emulator is the more exact of the two.
"""

from __future__ import annotations

import numpy as np

from .alu import from_bf16

LANES = 32


def element(bits: np.ndarray, kind: str) -> np.ndarray:
    """Matrix elements as float64: `bits` uint16 of bf16 and f16, uint32 of tf32."""
    if kind == "bf16":
        return from_bf16(bits).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (bits & 0xFFFFE000).view(np.float32).astype(np.float64)  # the low 13 bits are not read
    raise NotImplementedError(kind)


def split(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, 8 groups, 4 lanes, registers, elements of one) of 32-bit registers."""
    stacked = np.stack(registers, -1)
    stacked = np.ascontiguousarray(stacked.reshape(-1, 8, 4, len(registers)))
    if kind == "tf32":
        return stacked[..., None]
    return stacked.view(np.uint16).reshape(*stacked.shape, 2)


def fragment_a(registers, kind: str) -> np.ndarray:
    """A of m16nNkK, (warps, 16, K): register 2 j + i holds rows 8 i .. and the j-th run of columns."""
    x = split(registers, kind)
    w, g, t, r, e = x.shape
    if r == 1:
        raise NotImplementedError("m16n8k4")
    x = x.reshape(w, g, t, r // 2, 2, e).transpose(0, 4, 1, 3, 2, 5)
    return element(np.ascontiguousarray(x).reshape(w, 16, r // 2 * 4 * e), kind)


def fragment_b(registers, kind: str) -> np.ndarray:
    """B of m16n8kK, (warps, K, 8)."""
    x = split(registers, kind)
    w, _, _, r, e = x.shape
    return element(np.ascontiguousarray(x.transpose(0, 3, 2, 4, 1)).reshape(w, r * 4 * e, 8), kind)


def accumulator(registers: list[np.ndarray]) -> np.ndarray:
    """C or D, (warps, 16, columns), of float32 registers: four of them to eight columns."""
    x = np.stack(registers, -1).view(np.float32).reshape(-1, 8, 4, len(registers) // 4, 2, 2)
    return x.transpose(0, 4, 1, 3, 2, 5).reshape(x.shape[0], 16, len(registers) * 2)


def accumulator_registers(matrix: np.ndarray) -> np.ndarray:
    """The reverse of `accumulator`: (lanes, registers), uint32."""
    w, _, n = matrix.shape
    x = matrix.astype(np.float32).reshape(w, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return np.ascontiguousarray(x).reshape(w * LANES, n // 2).view(np.uint32)


def matmul(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once."""
    return (a @ b + c).astype(np.float32)


def spread_rows(matrices: np.ndarray, trans: bool) -> np.ndarray:
    """ldmatrix: (warps, 8 rows, 8) uint16 to what lane 4 r + t holds of row r, (warps * 32,) uint32."""
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    return np.ascontiguousarray(matrices).view(np.uint32).reshape(-1)


def gather_rows(register: np.ndarray, trans: bool) -> np.ndarray:
    """stmatrix, the reverse: (warps, 8, 8) uint16."""
    matrices = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrices.transpose(0, 2, 1)) if trans else matrices


# Shared memory as wgmma and TMA see it.

SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # the descriptor's layout type: none, 128, 64, 32 bytes; bits exchanged


def swizzle(address: np.ndarray, bits: int) -> np.ndarray:
    """Address bits 4.. are xored with the `bits` address bits from 7 on."""
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


def operand_addresses(descriptor: int, outer: int, inner: int, size: int, transposed: bool) -> np.ndarray:
    """Byte addresses of an operand's elements, (outer, inner): A is (64, K), B is (N, K).

    `transposed`: the outer dimension lies contiguous ("MN-major").
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    base_offset = descriptor >> 49 & 7
    layout = descriptor >> 62 & 3
    if base_offset:
        raise NotImplementedError("wgmma descriptors with a base offset")
    bits = SWIZZLES[layout]
    chunk = 16 // size  # elements of 16 bytes
    o, k = np.meshgrid(np.arange(outer), np.arange(inner), indexing="ij")
    if transposed:
        run = chunk << bits  # elements side by side
        within = o % chunk * size + o % run // chunk * 16
        if bits:
            offset = within + o // run * leading + k % 8 * (16 << bits) + k // 8 * stride
        else:
            offset = within + o // run * stride + k % 8 * 16 + k // 8 * leading
    else:
        row = o % 8 * (16 << bits) + o // 8 * stride
        column = k % chunk * size + k // chunk * (16 if bits else leading)
        offset = row + column
    return swizzle(start + offset, bits)
