"""Kernels of one instruction: PTX written by hand around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .launch import Options, Tensors, run
from .machine import Program
from .parse import parse

NAMES = {"p": "pred", "h": "b16", "r": "b32", "d": "b64"}
KINDS = {
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), "h"),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), "r"),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), "d"),
}


def kernel(body: str, pointers: int, threads: int = 32, shared: int = 0, maps: int = 0) -> Program:
    """`body` may use %h, %r, %d (0 to 99), %p (0 to 9), smem; %d0.. hold the pointers, %r99 the thread's number."""
    params = [f".param .u64 k_{i}" for i in range(pointers)] + [
        f".param .align 64 .b8 map{i}[128]" for i in range(maps)
    ]
    lines = [f"ld.param.u64 %d{i}, [k_{i}];" for i in range(pointers)]
    array = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    return Program(parse(f"""
.version 8.4
.target sm_90a
.address_size 64
.visible .entry k({", ".join(params)}) .reqntid {threads}
{{
.reg .pred %p<10>; .reg .b16 %h<100>; .reg .b32 %r<100>; .reg .b64 %d<100>; {array}
{chr(10).join(lines)}
mov.u32 %r99, %tid.x;
{body}
ret;
}}
"""))  # fmt: skip


def launch(program: Program, arrays: Sequence[np.ndarray], maps: Sequence = (), grid: int = 1, **options) -> None:
    """Arrays are read and written in place. `maps`: functions from the memory to a tensor map."""
    memory, tensors = Tensors(), [torch.from_numpy(a.view(np.uint8)) for a in arrays]
    values = [*(memory.address(t) for t in tensors), *(m(memory) for m in maps)]
    run(program, values, (grid,), program.kernel.threads, memory, 0, Options(**options))
    memory.fetch()


def elementwise(
    instruction: str, out: str, kinds: Sequence[str], operands: Sequence[np.ndarray], tail: str = ""
) -> np.ndarray:
    """`instruction` of one element of each operand, as bits of kind `out`."""
    size = {"h": 2, "r": 4, "d": 8}
    n = -(-operands[0].size // 32) * 32
    lines, names = [], []
    for i, kind in enumerate(kinds):
        letter = KINDS[kind]
        lines += [f"mad.wide.u32 %d{80 + i}, %r99, {size[letter]}, %d{i};",
                  f"ld.global.{NAMES[letter]} %{letter}{10 + i}, [%d{80 + i}];"]  # fmt: skip
        names.append(f"%{letter}{10 + i}")
    letter = KINDS[out]
    lines += [
        f"{instruction} %{letter}20, {', '.join(names)}{tail};",
        f"mad.wide.u32 %d90, %r99, {size[letter]}, %d{len(kinds)};",
        f"st.global.{NAMES[letter]} [%d90], %{letter}20;",
    ]
    arrays = [np.resize(o, n) for o in operands] + [np.zeros(n, f"u{size[letter]}")]
    launch(kernel("\n".join(lines), len(arrays), n), arrays)
    return arrays[-1][: operands[0].size]
