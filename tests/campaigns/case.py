"""One call of the layer, as a line of text: what `tests.campaigns.numbers` draws, runs and shrinks."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastlora.accuracy import Inputs
from fastlora.paths import cpu

from .guarded import guarded

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("plain", "transposed", "reversed", "expanded", "broadcast", "sliced", "stepped", "rows", "guarded")
LAID = ("x", "weight", "lora_A", "lora_B", "dy")  # in one of the LAYOUTS
TENSORS = (*LAID, "bias")
SPECIALS = ("nan", "inf", "-inf")
TRANSFORMS = ("vmap", "func_grad", "jvp")
KERNELS = ("hybrid", "onepass", "split")  # paths of Triton's kernels, in its interpreter
MODES = (
    *("plain", "no_grad", "inference", "autocast", "checkpoint", "reentrant", "retain", "create_graph"),
    *("shared", "changed", "kept_elsewhere", "other_thread"),
)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 33, 64, 70)
LARGE = (100, 129, 257, 300, 515)  # several blocks of the CPU kernels' rows, and work for several threads
INSTRUCTIONS = tuple(cpu._cpu.instructions()) if cpu._cpu else ()  # of this processor; a case may name no other


@dataclass(frozen=True)
class Case:
    """The default is the simplest call; `str()` names only what differs from it."""

    seed: int = 0
    face: str = "function"  # or layer, peft, conv1d (PEFT's layer over transformers' Conv1D)
    path: str | None = None
    node: bool = True  # path `cpu` by way of its autograd node in C++, where that was compiled
    instructions: str | None = None  # the set that path `cpu` computes with; None is the processor's best
    threads: int = 1
    mode: str = "plain"
    scaling_is: str = "float"  # or tensor
    lead: tuple[int, ...] = ()
    N: int = 1
    K: int = 1
    R: int = 1
    dtype: str = "f32"
    adapter: str | None = None  # the adapters' dtype; None is x's
    bias: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    x: str = "plain"  # the layouts in memory
    weight: str = "plain"
    lora_A: str = "plain"
    lora_B: str = "plain"
    dy: str = "plain"
    size: tuple[str, float] | None = None  # a tensor, and what it is multiplied by
    special: tuple[tuple[str, str], ...] = ()  # tensors, and what stands in one of their elements
    wants: str = "XABb"  # who asks for a gradient; with DoRA m does, the magnitude
    base: str | None = None  # bitsandbytes' form of the weight: nf4, nf4 double, fp4, fp4 double, int8
    dora: bool = False

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


def draw(rng: random.Random, paths: tuple[str | None, ...] = (None, "torch"), faces=None) -> Case:
    """A random case. With kernels among `paths`, only what they take (dtypes, ranks) and only small shapes."""
    kernels = bool(set(KERNELS) & set(paths))
    sizes = SIZES[:13] if kernels else SIZES
    face = rng.choice(faces or ("function", "function", "layer", "peft", "conv1d"))
    mode = rng.choice((*["plain"] * 8, *MODES, *(() if kernels else TRANSFORMS)))
    dtype = rng.choice(("f32", "f16") if kernels else ("f32", "f32", "bf16", "bf16", "f16", "f64"))
    adapter = rng.choice((None, None, "f32"))
    if not kernels and face != "layer" and rng.random() < 0.1:
        adapter = rng.choice(tuple(DTYPES))
    if mode == "autocast" and dtype != "f64":
        dtype = "f32"
    lead = tuple(rng.choice(sizes[:9] if i else sizes) for i in range(rng.choice((0, 1, 1, 1, 2, 2, 3))))
    N, K, R = rng.choice(sizes), rng.choice(sizes), rng.choice((1, 2, 3, 4, 8, 8, 16, 33))
    threads = 1
    if not kernels and rng.random() < 0.04:
        M, N, K = rng.choices(LARGE[:2] if dtype == "f16" else LARGE, k=3)  # ATen's float16 takes seconds
        lead, R, threads = (M,), rng.choice((5, 16, 32, 64, 128)), rng.choice((1, 2, 3))
        if rng.random() < 0.1 and dtype != "f16":  # whose range such sums leave
            N, K = rng.choice(((9, 9001), (9001, 9)))  # rows too long for a whole block
    if rng.random() < 0.06:
        at = rng.randrange(len(lead) + 2)
        if at < len(lead):
            lead = (*lead[:at], 0, *lead[at + 1 :])
        elif face == "function":
            N, K = (0, K) if at == len(lead) else (N, 0)
    layouts = {name: rng.choice(LAYOUTS) if rng.random() < 0.35 else "plain" for name in LAID}
    if face == "conv1d" and mode in TRANSFORMS:
        layouts["x"] = "plain"  # PEFT's own forward runs then, and transformers' takes a view of x
    bias = face == "conv1d" or rng.random() < 0.5
    half = "f16" in (dtype, adapter) or mode == "autocast"
    mixed = half and adapter != "f16" and (adapter or mode == "autocast")  # the range of float16 where eager has more
    factors = (1e-2, 1e2) if half or dtype == "bf16" else (1e-6, 1e-2, 1e2, 1e6)
    names = [name for name in TENSORS if bias or name != "bias"]
    # one alone, and where nothing is repeated or differentiated twice: of two infinities that meet, or one that meets a
    # zero, the signs and so NaN may hang on sums that cancel
    name = rng.choice(names)
    special = () if {"expanded", "broadcast"} & set(layouts.values()) else ((name, rng.choice(SPECIALS)),)
    scalings = (1.0, 2.0, 2.0, 0.5, 16.0, 1 / 3, -2.5, 0.0, *(() if mixed else (100.0,) if half else (1e4, 1e30)))
    last = 0.9 if half or kernels else 1 - 1e-6  # its factor leaves float16's range
    dropout = 0.0 if mode in TRANSFORMS else rng.choice((0.0, 0.0, 0.0, 0.1, 0.1, 0.5, 0.5, 0.9, 1e-9, last))
    if kernels and dropout:
        special = ()  # where they drop an element the kernels put zero, and eager 0 * x: NaN for what is not finite
    if kernels and half:
        scalings = scalings[:8]  # the kernels' S holds the scaling, and overflows where eager's S does not
    scaling = rng.choice(scalings)
    # float16 has no room for both; and what is rounded to bfloat16 on its way there may pass its end
    full = (half and (scaling == 100.0 or dropout == 0.9)) or (scaling == 1e30 and dropout > 0.9)
    roomy = not mixed and not full and not (dtype == "bf16" and adapter == "f16")
    if scaling == 1e30:
        factors = factors[:-1]  # nor has float32 for both: which sum passes its end is a matter of their order
    sized = rng.random() < 0.15 and roomy
    return Case(
        seed=rng.randrange(2**31), face=face, path=rng.choice(paths), mode=mode, lead=lead, N=N, K=K, R=R, dtype=dtype,
        adapter=None if adapter == dtype else adapter, bias=bias,
        scaling=scaling, dropout=dropout, **layouts,
        size=(rng.choice(names), rng.choice(factors)) if sized else None,
        special=special if mode not in (*TRANSFORMS, "create_graph") and rng.random() < 0.12 else (),
        wants="XABb" if rng.random() < 0.6 else "".join(c for c in "XABb" if rng.random() < 0.5),
        node=rng.random() < 0.6, threads=threads, scaling_is=rng.choice(("float", "float", "float", "tensor")),
        instructions=rng.choice((None, None, *INSTRUCTIONS)),
    )  # fmt: skip


def tensors(case: Case) -> Inputs:
    """The arguments of the case's call, without a mask."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    adapter = DTYPES[case.adapter or case.dtype]
    N, K, R = case.N, case.K, case.R
    shapes = {
        "x": ((*case.lead, K), 1.0, dtype), "weight": ((N, K), max(K, 1) ** -0.5, dtype),
        "lora_A": ((R, K), max(K, 1) ** -0.5, adapter), "lora_B": ((N, R), R**-0.5, adapter),
        "bias": ((N,), 1.0, dtype), "dy": ((*case.lead, N), 1.0, dtype),
    }  # fmt: skip
    made = {}
    for name, (shape, scale, kind) in shapes.items():
        t = torch.randn(shape, generator=generator) * scale
        if case.size and case.size[0] == name:
            t = t * case.size[1]
        for which, value in case.special:
            if which == name and t.numel():
                t.view(-1)[case.seed % t.numel()] = float(value)
        made[name] = lay(t.to(kind), getattr(case, name) if name != "bias" else "plain")
    if not case.bias and case.face != "conv1d":
        made["bias"] = None
    return Inputs(**made, scaling=case.scaling)


def lay(t: Tensor, layout: str) -> Tensor:
    """`t` as another view of memory, NaN around it; the expanded ones repeat its first row or column."""
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "reversed" and t.dim() >= 2:
        order = tuple(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    if layout == "guarded":
        return guarded(t)
    if layout == "expanded" and t.dim() >= 2 and t.shape[0]:
        return t[:1].expand(t.shape)
    if layout == "broadcast" and t.shape[-1]:
        return t[..., :1].expand(t.shape)
    if layout == "sliced":
        base = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
        view = base[..., 1:-2]
    elif layout == "stepped":
        base = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        view = base[..., ::2]
    elif layout == "rows" and t.dim() >= 2:
        base = t.new_full((3 * t.shape[0], *t.shape[1:]), float("nan"))
        view = base[1::3]
    else:
        return t.contiguous()
    return view.copy_(t)


def simpler(case: Case):
    """Cases that differ from `case` in one thing and are simpler in it, the boldest first."""
    plain = Case()
    for field in fields(Case):
        if field.name != "seed" and getattr(case, field.name) != getattr(plain, field.name):
            yield replace(case, **{field.name: getattr(plain, field.name)})
    for i, size in enumerate(case.lead):
        yield replace(case, lead=case.lead[:i] + case.lead[i + 1 :])
        yield from (replace(case, lead=(*case.lead[:i], s, *case.lead[i + 1 :])) for s in smaller(size))
    for name in ("N", "K", "R"):
        yield from (replace(case, **{name: size}) for size in smaller(getattr(case, name)))
    yield from (replace(case, special=(one,)) for one in case.special if len(case.special) > 1)
    yield from (replace(case, wants=case.wants.replace(c, "")) for c in case.wants)
    if case.seed > 9:
        yield from (replace(case, seed=seed) for seed in range(10))


def smaller(size: int):
    """Smaller sizes, the smallest first."""
    return sorted({s for s in (1, 2, 3, size // 2, size - 1) if 0 < s < size})
