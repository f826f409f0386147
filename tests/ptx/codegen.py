"""A kernel to Python: one function for each basic block, working on all lanes `S` that are there together.

Registers are rows of numpy arrays, one column a lane, seen as U32, I32, F32, ... An arithmetic instruction becomes one
assignment; what touches memory, other lanes or time becomes a call of the machine.
"""

from __future__ import annotations

import re

import numpy as np

from . import alu
from .forms import understood
from .memory import SHARED_BASE
from .parse import SINK, Imm, Ins, Kernel, Mem, Pair, Reg, Special, Symbol, Unsupported, Vec

VIEWS = {
    "b16": "U16", "u16": "U16", "s16": "I16", "f16": "F16", "bf16": "U16",
    "b32": "U32", "u32": "U32", "s32": "I32", "f32": "F32", "f16x2": "U32", "bf16x2": "U32", "tf32": "U32",
    "b64": "U64", "u64": "U64", "s64": "I64", "f64": "F64", "f32x2": "U64",
}  # fmt: skip
NUMPY = {"U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16, "U32": np.uint32,
         "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64}  # fmt: skip
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
           "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
ROUND = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
SEMANTICS = {"volatile": "relaxed", "relaxed": "relaxed", "acquire": "acquire", "release": "release"}
SCOPES = ("cta", "cluster", "gpu", "sys")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def width_of(kind: str) -> int:
    return {"pred": 1}.get(kind) or int(re.search(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)


def view_of(kind: str) -> str:
    """The typed rows of a kind; 8-bit kinds have no rows of their own."""
    return VIEWS.get(kind) or ("I8" if kind == "s8" else "U8")


def numpy_of(kind: str) -> str:
    return f"np.{np.dtype(NUMPY[view_of(kind)]).name}"


class Codegen:
    def __init__(self, kernel: Kernel, shared_address: dict[str, int]) -> None:
        self.kernel = kernel
        self.shared_address = shared_address
        self.names: dict[str, object] = {"np": np, "alu": alu}
        self.lines: list[str] = []

    def functions(self) -> list:
        for number, block in enumerate(self.kernel.blocks):
            self.lines += [
                f"def block{number}(m, S):",
                " P, U16, I16, F16, U32, I32, F32, U64, I64, F64 = m.views",
            ]
            for ins in block.body:
                self._instruction(ins)
            if block.end and not understood(block.end.op):
                raise Unsupported(str(block.end))
        exec(compile("\n".join(self.lines), f"<{self.kernel.name}>", "exec"), self.names)
        return [self.names[f"block{n}"] for n in range(len(self.kernel.blocks))]

    def const(self, value) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    # Operands

    def read(self, operand, kind: str) -> str:
        if isinstance(operand, Imm):
            return self._immediate(operand, kind)
        if isinstance(operand, Special):
            return f"m.special({operand.name!r}, S).astype({numpy_of(kind)})"
        if isinstance(operand, Symbol):
            return self.const(np.array([self.address(operand)], NUMPY[view_of(kind)]))
        if operand.kind == "p":
            return f"P[{operand.index},S]"
        if int(operand.kind) == width_of(kind):
            return f"{VIEWS[kind]}[{operand.index},S]"
        if int(operand.kind) < width_of(kind):
            raise Unsupported(f"{kind} from a narrower register")
        return f"U{operand.kind}[{operand.index},S].astype(np.uint{width_of(kind)}).view({numpy_of(kind)})"

    def _immediate(self, operand: Imm, kind: str) -> str:
        if kind == "pred":
            return self.const(np.array([bool(operand.value)]))
        dtype = np.dtype(NUMPY[view_of(kind)])
        if dtype.kind == "f":
            if not operand.is_float:
                raise Unsupported(f"immediate {operand.value} for {kind}")
            return self.const(np.array([operand.value], dtype))
        if operand.is_float:
            wide = np.float64 if dtype.itemsize == 8 else np.float32
            return self.const(np.array([operand.value], wide).view(dtype))
        value = operand.value & ((1 << 8 * dtype.itemsize) - 1)
        return self.const(np.array([value], f"u{dtype.itemsize}").view(dtype))

    def address(self, symbol: Symbol | Imm) -> int:
        if isinstance(symbol, Imm):
            return symbol.value
        if symbol.name in self.shared_address:
            return SHARED_BASE + self.shared_address[symbol.name]
        if symbol.name in self.kernel.params:
            return self.kernel.params[symbol.name].offset  # in parameter space
        raise Unsupported(f"symbol {symbol.name}")

    def write(self, operand, kind: str, expression: str) -> None:
        if operand == SINK:
            return
        if operand.kind == "p":
            self.line(f"P[{operand.index},S] = {expression}")
        elif int(operand.kind) == width_of(kind):
            self.line(f"{VIEWS[kind]}[{operand.index},S] = {expression}")
        elif int(operand.kind) > width_of(kind):
            sign = "I" if kind.startswith("s") else "U"
            self.line(f"{sign}{operand.kind}[{operand.index},S] = {expression}")
        else:
            raise Unsupported(f"{kind} into a narrower register")

    def memory(self, operand: Mem) -> str:
        if isinstance(operand.base, Reg):
            base = self.read(operand.base, "u64" if operand.base.kind == "64" else "u32") + ".astype(np.int64)"
        else:
            base = f"m.everywhere({self.address(operand.base)}, S)"
        return f"{base} + {operand.offset}" if operand.offset else base

    def line(self, text: str) -> None:
        self.lines.append(" " * self.indent + text)

    def _instruction(self, ins: Ins) -> None:
        name, *parts = ins.parts
        if not understood(ins.op):
            raise Unsupported(str(ins))
        self.indent = 1
        if ins.guard:
            sign = "~" if ins.negated else ""
            self.line(f"whole, S = S, m.narrow(S, {sign}P[{ins.guard.index},S])")
            self.line("if S is not None:")
            self.indent = 2
            self.line("pass")
        try:
            getattr(self, "op_" + name)(ins, ins.args, parts)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise Unsupported(f"{ins}: {error!r}") from error
        if ins.guard:
            self.indent = 1
            self.line("S = whole")

    # Arithmetic

    def _arithmetic(self, ins, args, kind: str, expression: str) -> None:
        """`expression` of {0}, {1}, {2}; .ftz makes subnormal operands and results zeros."""
        reads = [self.read(x, kind) for x in args[1:]]
        if "ftz" in ins.parts:
            reads = [f"alu.flush({r})" for r in reads]
            expression = f"alu.flush({expression})"
        self.write(args[0], kind, expression.format(*reads))

    def _infix(self, ins, args, parts) -> None:
        name, kind = ins.parts[0], parts[-1]
        if kind in HALVES and parts[:-1] in (["rn", "f32"], ["f32"]):
            half = self.read(args[1], kind)
            half = f"alu.from_bf16({half})" if kind == "bf16" else f"{half}.astype(np.float32)"
            self.write(args[0], "f32", f"{half} {INFIX[name]} {self.read(args[2], 'f32')}")
        elif kind in HALVES or kind == "f32x2":
            self._packed(ins, args, kind)
        else:
            self._arithmetic(ins, args, kind, f"{{0}} {INFIX[name]} {{1}}")

    op_add = op_sub = op_and = op_or = op_xor = _infix

    def _packed(self, ins, args, kind: str) -> None:
        """One or two halves, or two float32, in a register: each for itself."""
        bits = f"b{width_of(kind)}"
        reads = ", ".join(self.read(x, bits) for x in args[1:])
        name = ins.parts[0] + ("_nan" if "NaN" in ins.parts else "")
        self.write(args[0], bits, f"alu.packed({name!r}, {kind.removesuffix('x2')!r}, {reads})")

    def op_not(self, ins, args, parts):
        self._arithmetic(ins, args, parts[-1], "~{0}")

    def op_neg(self, ins, args, parts):
        if parts[-1] in HALVES:
            self._packed(ins, args, parts[-1])
        else:
            self._arithmetic(ins, args, parts[-1], {"neg": "-{0}", "abs": "np.abs({0})"}[ins.parts[0]])

    op_abs = op_neg

    def op_mul(self, ins, args, parts):
        if parts[0] in ("lo", "hi", "wide"):
            kind = parts[-1]
            out, product = self._product(kind, parts[0], *(self.read(x, kind) for x in args[1:3]))
            self.write(args[0], out, product)
        else:
            self._infix(ins, args, parts)

    def _product(self, kind, part, a, b) -> tuple[str, str]:
        if part == "wide":
            wide = f"{kind[0]}{2 * width_of(kind)}"
            return wide, f"{a}.astype({numpy_of(wide)}) * {b}"
        return kind, f"alu.mul_hi({a}, {b})" if part == "hi" else f"{a} * {b}"

    def op_mad(self, ins, args, parts):
        kind = parts[-1]
        out, product = self._product(kind, parts[0], *(self.read(x, kind) for x in args[1:3]))
        self.write(args[0], out, f"{product} + {self.read(args[3], out)}")

    def op_fma(self, ins, args, parts):
        if parts[-1] in HALVES or parts[-1] == "f32x2":
            self._packed(ins, args, parts[-1])
        else:
            self._arithmetic(ins, args, parts[-1], f"alu.fma{parts[-1][1:]}({{0}}, {{1}}, {{2}})")

    def op_div(self, ins, args, parts):
        self._arithmetic(ins, args, parts[-1], "{0} / {1}" if parts[-1][0] == "f" else "alu.quotient({0}, {1})")

    def op_rem(self, ins, args, parts):
        self._arithmetic(ins, args, parts[-1], "alu.remainder({0}, {1})")

    def op_min(self, ins, args, parts):
        kind, name = parts[-1], ins.parts[0]
        if kind in HALVES:
            self._packed(ins, args, kind)
            return
        name = f"f{name}" if kind[0] == "f" and "NaN" not in parts else f"{name}imum"
        self._arithmetic(ins, args, kind, f"np.{name}({{0}}, {{1}})")

    op_max = op_min

    def op_rcp(self, ins, args, parts):
        function = {"rcp": "np.float32(1) / {0}", "sqrt": "np.sqrt({0})", "rsqrt": "np.float32(1) / np.sqrt({0})",
                    "ex2": "np.exp2({0})", "lg2": "np.log2({0})"}[ins.parts[0]]  # fmt: skip
        self._arithmetic(ins, args, "f32", function)

    op_sqrt = op_rsqrt = op_ex2 = op_lg2 = op_rcp

    def op_shl(self, ins, args, parts):
        kind, bits = parts[-1], width_of(parts[-1])
        a = self.read(args[1], kind)
        if isinstance(args[2], Imm) and 0 <= args[2].value < bits:
            sign = "<<" if ins.parts[0] == "shl" else ">>"
            self.write(args[0], kind, f"{a} {sign} {self._immediate(args[2], kind)}")
        else:
            self.write(args[0], kind, f"alu.{ins.parts[0]}({a}, {self.read(args[2], 'u32')})")

    op_shr = op_shl

    def op_shf(self, ins, args, parts):
        reads = ", ".join(self.read(x, "u32") for x in args[1:4])
        self.write(args[0], "b32", f"alu.funnel({reads}, {parts[0]!r}, {parts[1] == 'wrap'})")

    def op_bfe(self, ins, args, parts):
        kind = parts[-1]
        reads = self.read(args[1], kind), self.read(args[2], "u32"), self.read(args[3], "u32")
        self.write(args[0], kind, "alu.bfe({}, {}, {})".format(*reads))

    def op_bfi(self, ins, args, parts):
        self._arithmetic(ins, args, "b32", "alu.bfi({0}, {1}, {2}, {3})")

    def op_prmt(self, ins, args, parts):
        self._arithmetic(ins, args, "b32", "alu.prmt({0}, {1}, {2})")

    def op_lop3(self, ins, args, parts):
        self._arithmetic(ins, args[:4], "b32", f"alu.lop3({{0}}, {{1}}, {{2}}, {args[4].value})")

    def op_popc(self, ins, args, parts):
        self.write(args[0], "u32", f"alu.{ins.parts[0]}({self.read(args[1], parts[-1])})")

    op_clz = op_brev = op_popc

    def op_setp(self, ins, args, parts):
        kind = parts[-1]
        reads = [self.read(x, kind) for x in args[1:3]]
        if kind == "bf16":
            reads = [f"alu.from_bf16({r})" for r in reads]
        if "ftz" in parts:
            reads = [f"alu.flush({r})" for r in reads]
        test = self._compare(parts[0], kind.removeprefix("b") if kind == "bf16" else kind, *reads)
        join = {"and": "&", "or": "|", "xor": "^"}.get(parts[1])
        first, second = (args[0].first, args[0].second) if isinstance(args[0], Pair) else (args[0], None)
        extra = f" {join} {self.read(args[3], 'pred')}" if join else ""
        self.line(f"t = {test}")
        self.write(first, "pred", f"t{extra}")
        if second:
            self.write(second, "pred", f"(~t){extra}")

    def _compare(self, name, kind, a, b) -> str:
        if kind[0] == "f" and name.endswith("u") and name[:-1] in COMPARE:
            return f"({a} {COMPARE[name[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
        if kind[0] == "f" and name == "ne":
            return f"({a} != {b}) & ~np.isnan({a}) & ~np.isnan({b})"
        if name in ("num", "nan"):
            return f"{'~' if name == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
        return f"{a} {COMPARE[name]} {b}"

    def op_selp(self, ins, args, parts):
        kind = parts[-1]
        a, b = (self.read(x, kind) for x in args[1:3])
        self.write(args[0], kind, f"np.where({self.read(args[3], 'pred')}, {a}, {b})")

    def op_mov(self, ins, args, parts):
        kind, target, source = parts[-1], args[0], args[1]
        if isinstance(target, Vec):  # unpack
            part = f"b{width_of(kind) // len(target.items)}"
            self.line(f"t = {self.read(source, kind)}")
            for i, item in enumerate(target.items):
                self.write(item, part, f"(t >> {numpy_of(kind)}({i * width_of(part)})).astype({numpy_of(part)})")
        elif isinstance(source, Vec):  # pack
            part, name = f"b{width_of(kind) // len(source.items)}", numpy_of(kind)
            pieces = [
                f"({self.read(item, part)}.astype({name}) << {name}({i * width_of(part)}))"
                for i, item in enumerate(source.items)
            ]
            self.write(target, kind, " | ".join(pieces))
        else:
            self.write(target, kind, self.read(source, kind))

    def op_cvta(self, ins, args, parts):
        sign = "-" if parts[0] == "to" else "+"
        window = {"param": "m.param_window", "local": "m.local_window"}.get(parts[-2])
        move = f" {sign} np.uint64({window})" if window else ""  # shared and global are their own windows
        self.write(args[0], "u64", self.read(args[1], "u64") + move)

    def op_cvt(self, ins, args, parts):
        *modes, to, kind = parts
        if to in ("bf16x2", "f16x2"):
            if modes != ["rn"] or kind != "f32":
                raise Unsupported(str(ins))
            high, low = (f"alu.to_{to[:-2]}({self.read(x, 'f32')}).astype(np.uint32)" for x in args[1:3])
            self.write(args[0], "b32", f"{high} << np.uint32(16) | {low}")
            return
        a = self.read(args[1], kind)
        if kind == "bf16":
            a, kind = f"alu.from_bf16({a})", "f32"
        if "ftz" in modes:
            a = f"alu.flush({a})"
        rounding = next((m for m in modes if m.endswith("i")), None)
        floats = kind[0] == "f", to[0] == "f" or to in ("bf16", "tf32")
        if floats == (True, False) and rounding:
            value = f"alu.to_int({a}, {numpy_of(to)}, {rounding!r})"
        elif floats == (False, False) and not modes:
            value = f"{a}.astype({numpy_of(to)})"
        elif to == "tf32" and "rna" in modes and kind == "f32":
            value = f"alu.to_tf32({a})"
        elif floats[1] and to == kind and rounding:
            value = f"{ROUND[rounding]}({a})"
        elif to in ("bf16", "f16") and modes == ["rn"] and kind in ("f32", "f16"):
            value = f"alu.to_{to}({a})" + (".view(np.float16)" if to == "f16" else "")
        elif to in ("f32", "f64") and set(modes) <= {"rn", "ftz"} and ("rn" in modes or floats[0]):
            value = f"{a}.astype({numpy_of(to)})"
            value = f"alu.flush({value})" if "ftz" in modes else value
        else:
            raise Unsupported(str(ins))
        self.write(args[0], to, value)

    # Memory

    @staticmethod
    def _vector(parts) -> int:
        return next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)

    @staticmethod
    def _space(args, parts) -> str:
        spaces = (p.split("::")[0] for p in parts)
        space = next((s for s in spaces if s in ("global", "shared", "local", "param")), "generic")
        return "local" if space == "param" and isinstance(args.base, Imm) else space  # of a function called

    @staticmethod
    def _order(parts) -> str:
        """Semantics and scope of a strong access: what says volatile is relaxed, for the whole system."""
        sem = next((SEMANTICS[p] for p in parts if p in SEMANTICS), None)
        return f"{sem!r}, {next((p for p in parts if p in SCOPES), 'sys')!r}"

    def op_ld(self, ins, args, parts):
        kind, space, count = parts[-1], self._space(args[1], parts), self._vector(parts)
        targets = args[0].items if isinstance(args[0], Vec) else (args[0],)
        size = width_of(kind) // 8
        if len(targets) != count:
            raise Unsupported(str(ins))
        if space == "param" and isinstance(args[1].base, Symbol):
            offset = self.address(args[1].base) + args[1].offset
            for i, target in enumerate(targets):
                self.write(target, kind, f"m.parameter({offset + i * size}, {numpy_of(kind)})")
            return
        order = self._order(parts)
        self.line(f"t = m.ld({self.const(ins)}, S, {space!r}, {self.memory(args[1])}, {size * count}, {order})")
        self.line(f"t = t.view({numpy_of(kind)})")
        for i, target in enumerate(targets):
            self.write(target, kind, f"t[:, {i}]")

    def op_st(self, ins, args, parts):
        kind, space, count = parts[-1], self._space(args[0], parts), self._vector(parts)
        sources = args[1].items if isinstance(args[1], Vec) else (args[1],)
        if len(sources) != count or space == "param":
            raise Unsupported(str(ins))
        values = ", ".join(self.read(x, kind) for x in sources)
        self.line(
            f"m.st({self.const(ins)}, S, {space!r}, {self.memory(args[0])}, {width_of(kind) // 8 * count}, "
            f"{self._order(parts)}, {numpy_of(kind)}, ({values},))"
        )

    def op_atom(self, ins, args, parts):
        target, place, *operands = args if ins.parts[0] == "atom" else (SINK, *args)
        kind, op = parts[-1], parts[-2]
        if kind[0] == "f" and op != "add":
            raise Unsupported(str(ins))
        sem = next((p for p in parts if p in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
        scope = next((p for p in parts if p in SCOPES), "gpu")
        values = ", ".join(self.read(x, kind) for x in operands)
        self.line(
            f"t = m.atom({self.const(ins)}, S, {self._space(place, parts)!r}, {self.memory(place)}, {op!r}, "
            f"{numpy_of(kind)}, ({values},), {sem!r}, {scope!r})"
        )
        self.write(target, kind, "t")

    op_red = op_atom

    def op_cp(self, ins, args, parts):
        k = self.const(ins)
        if parts[1] == "bulk":
            self._bulk(ins, args, parts, k)
        elif parts[1] == "commit_group":
            self.line("m.cp_commit(S)")
        elif parts[1] == "wait_group":
            self.line(f"m.cp_wait(S, {args[0].value})")
        elif parts[1] == "wait_all":
            self.line("m.cp_commit(S)")
            self.line("m.cp_wait(S, 0)")
        else:
            if len(args) > 3 and isinstance(args[3], Reg) and args[3].kind == "p":
                raise Unsupported(f"{ins}: ignore-src")
            size = self.read(args[3], "u32") if len(args) > 3 else "None"
            self.line(f"m.cp_async({k}, S, {self.memory(args[0])}, {self.memory(args[1])}, {args[2].value}, {size})")

    def op_ldmatrix(self, ins, args, parts):
        count, trans = len(args[0].items), "trans" in parts
        self.line(f"t = m.ldmatrix({self.const(ins)}, S, {self.memory(args[1])}, {count}, {trans})")
        for i, target in enumerate(args[0].items):
            self.write(target, "b32", f"t[{i}]")

    def op_stmatrix(self, ins, args, parts):
        values = ", ".join(self.read(x, "b32") for x in args[1].items)
        self.line(f"m.stmatrix({self.const(ins)}, S, {self.memory(args[0])}, [{values}], {'trans' in parts})")

    # Other lanes

    def op_mma(self, ins, args, parts):
        a, b, c = ("[" + ", ".join(self.read(x, "b32") for x in v.items) + "]" for v in args[1:4])
        self.line(f"t = m.mma({self.const(ins)}, S, {a}, {b}, {c}, {parts[6]!r})")
        for i, target in enumerate(args[0].items):
            self.write(target, "b32", f"t[:, {i}]")

    def _mask(self, ins, operand) -> None:
        """Which lanes take part: all of the warp, or we do not know it."""
        self.line(f"m.everyone({self.const(ins)}, S, {self.read(operand, 'u32')})")

    def op_shfl(self, ins, args, parts):
        self._mask(ins, args[4])
        target, inside = (args[0].first, args[0].second) if isinstance(args[0], Pair) else (args[0], None)
        a, b, c = (self.read(x, "u32") for x in args[1:4])
        self.line(f"t, inside = m.shfl({self.const(ins)}, S, {a}, {b}, {c}, {parts[1]!r})")
        self.write(target, "b32", "t")
        if inside:
            self.write(inside, "pred", "inside")

    def op_elect(self, ins, args, parts):
        self._mask(ins, args[1])
        self.line(f"t, inside = m.elect({self.const(ins)}, S)")
        self.write(args[0].first, "b32", "t")
        self.write(args[0].second, "pred", "inside")

    def op_vote(self, ins, args, parts):
        self._mask(ins, args[2])
        self.line(f"t = m.vote({self.const(ins)}, S, {self.read(args[1], 'pred')}, {parts[1]!r})")
        self.write(args[0], parts[-1], "t")

    def op_redux(self, ins, args, parts):
        self._mask(ins, args[2])
        self.line(f"t = m.redux({self.const(ins)}, S, {self.read(args[1], parts[-1])}, {parts[1]!r})")
        self.write(args[0], parts[-1], "t")

    def op_activemask(self, ins, args, parts):
        self.write(args[0], "b32", "m.active(S)")

    # Order, and what sm_90 adds

    def op_fence(self, ins, args, parts):
        if parts[0] == "proxy":
            self.line(f"m.fence_proxy(S, {parts[2].split('::')[0] if len(parts) > 2 else ''!r})")
        elif parts[0] in ("acq_rel", "sc"):
            self.line(f"m.fence(S, {parts[1]!r})")

    def op_membar(self, ins, args, parts):
        self.line(f"m.fence(S, { ({'gl': 'gpu'}.get(parts[0], parts[0]))!r})")

    def op_setmaxnreg(self, ins, args, parts):
        self.line(f"m.setmaxnreg({self.const(ins)}, S, {args[0].value})")

    def op_createpolicy(self, ins, args, parts):
        self.write(args[0], "b64", "0")

    def op_nanosleep(self, ins, args, parts):
        pass

    op_prefetch = op_griddepcontrol = op_nanosleep  # kernels run one after another

    def op_mbarrier(self, ins, args, parts):
        k, name = self.const(ins), parts[0]
        if name == "init":
            self.line(f"m.mbarrier_init({k}, S, {self.memory(args[0])}, {self.read(args[1], 'u32')})")
        elif name == "inval":
            self.line(f"m.mbarrier_inval({k}, S, {self.memory(args[0])})")
        elif name in ("arrive", "expect_tx"):
            target, where, *extra = args if name == "arrive" else (SINK, *args)
            extra = self.read(extra[0], "u32") if extra else "None"
            tx, count = (extra, "None") if "expect_tx" in parts else ("None", extra)
            self.line(f"t = m.mbarrier_arrive({k}, S, {self.memory(where)}, {tx}, {count}, {name == 'arrive'})")
            self.write(target, "b64", "t")
        else:
            token = self.read(args[2], "u32" if "parity" in parts else "u64")
            self.line(f"t = m.mbarrier_wait({k}, S, {self.memory(args[1])}, {token} & 1)")
            self.write(args[0], "pred", "t")

    def _bulk(self, ins, args, parts, k):
        if parts[2] == "commit_group":
            self.line("m.bulk_commit(S)")
        elif parts[2] == "wait_group":
            self.line(f"m.bulk_wait(S, {args[0].value}, {'read' in parts})")
        else:
            load = parts[-1] != "bulk_group" and "bulk_group" not in parts
            place = args[1] if load else args[0]
            if parts[2] == "tensor":
                base = self.memory(Mem(place.base, place.offset))
                what = f"m.maps_at({k}, {base}), ({', '.join(self.read(c, 's32') for c in place.coords)},)"
            else:
                what = f"m.runs_at({k}, {self.memory(place)}, {self.read(args[2], 'u32')}), (0,)"
            if load:
                barrier = args[2] if parts[2] == "tensor" else args[3]
                self.line(f"m.tma_load({k}, S, {self.memory(args[0])}, {what}, {self.memory(barrier)})")
            else:
                self.line(f"m.tma_store({k}, S, {what}, {self.memory(args[1])})")

    def op_wgmma(self, ins, args, parts):
        k = self.const(ins)
        if parts[0] != "mma_async":
            extra = f", {args[0].value}" if parts[0] == "wait_group" else ""
            self.line(f"m.wgmma_{parts[0].removesuffix('_group')}({k}, S{extra})")
            return
        n, depth = (int(v) for v in re.fullmatch(r"m64n(\d+)k(\d+)", parts[3]).groups())
        in_registers = isinstance(args[1], Vec)
        a = tuple(r.index for r in args[1].items) if in_registers else self.read(args[1], "b64")
        flags = [x.value for x in args[4:]]
        if flags[:2] != [1, 1]:
            raise Unsupported(f"{ins}: negated operands")
        trans = ([0] if in_registers else []) + flags[2:] if flags[2:] else [0, 0]
        d = tuple(r.index for r in args[0].items)
        self.line(
            f"m.wgmma({k}, S, {d}, {a}, {self.read(args[2], 'b64')}, {self.read(args[3], 'pred')}, "
            f"{n}, {depth}, {parts[-1]!r}, {tuple(trans)})"
        )
