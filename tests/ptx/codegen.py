"""A kernel to Python: one function for each basic block, working on all lanes `S` that are there together.

Registers are rows of numpy arrays, one column a lane, seen as U32, I32, F32, ... An arithmetic instruction becomes one
assignment; what touches memory, other lanes or time becomes a call of the machine.
"""

from __future__ import annotations

import re

import numpy as np

from . import alu
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
ROUND = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
HINTS = re.compile(r"(L1|L2|level)::\w+|nc|volatile|relaxed|weak|gpu|sys|cta|aligned|sync|ca|cg|cs|lu|cv|wb|wt|uni|ftz")


def width_of(kind: str) -> int:
    return {"pred": 1}.get(kind) or int(re.search(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)


def view_of(kind: str) -> str:
    """The typed rows of a kind; 8-bit kinds have no rows of their own."""
    return VIEWS.get(kind) or ("I8" if kind == "s8" else "U8")


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
            return f"m.special({operand.name!r}, S).astype(np.{np.dtype(NUMPY[view_of(kind)]).name})"
        if isinstance(operand, Symbol):
            return self.const(np.array([self.address(operand)], NUMPY[view_of(kind)]))
        if operand.kind == "p":
            return f"P[{operand.index},S]"
        if int(operand.kind) == width_of(kind):
            return f"{VIEWS[kind]}[{operand.index},S]"
        if int(operand.kind) < width_of(kind):
            raise Unsupported(f"{kind} from a narrower register")
        name = np.dtype(NUMPY[view_of(kind)]).name
        return f"U{operand.kind}[{operand.index},S].astype(np.uint{width_of(kind)}).view(np.{name})"

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

    def address(self, symbol: Symbol) -> int:
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

    # Instructions

    def _instruction(self, ins: Ins) -> None:
        self.indent = 1
        if ins.guard:
            sign = "~" if ins.negated else ""
            self.line(f"whole, S = S, m.narrow(S, {sign}P[{ins.guard.index},S])")
            self.line("if S is not None:")
            self.indent = 2
        name = ins.parts[0]
        method = getattr(self, "op_" + name, None)
        if method is None:
            raise Unsupported(str(ins))
        try:
            method(ins, ins.args, [p for p in ins.parts[1:] if not HINTS.fullmatch(p)])
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise Unsupported(f"{ins}: {error!r}") from error
        if ins.guard:
            self.indent = 1
            self.line("S = whole")

    def _infix(self, ins, args, parts) -> None:
        kind = parts[-1]
        if kind == "f32x2":
            self._pairs(ins, args)
            return
        if parts[:-1] in (["rn", "f32"], ["f32"]) and kind in ("f16", "bf16"):  # sm_100: a half and a float32
            half = f"alu.from_bf16({self.read(args[1], kind)})" if kind == "bf16" else self.read(args[1], kind)
            self.write(args[0], "f32", f"{half} {INFIX[ins.parts[0]]} {self.read(args[2], 'f32')}")
            return
        if set(parts[:-1]) - {"rn"} or kind.endswith("x2"):
            raise Unsupported(str(ins))
        a, b = (self.read(x, kind) for x in args[1:3])
        self.write(args[0], kind, f"{a} {INFIX[ins.parts[0]]} {b}")

    op_add = op_sub = op_and = op_or = op_xor = _infix

    def op_not(self, ins, args, parts):
        self.write(args[0], parts[-1], f"~{self.read(args[1], parts[-1])}")

    def op_neg(self, ins, args, parts):
        self.write(args[0], parts[-1], f"-{self.read(args[1], parts[-1])}")

    def op_abs(self, ins, args, parts):
        self.write(args[0], parts[-1], f"np.abs({self.read(args[1], parts[-1])})")

    def _pairs(self, ins, args) -> None:
        """Two float32 side by side, each for itself."""
        reads = ", ".join(self.read(x, "b64") for x in args[1:])
        self.write(args[0], "b64", f"alu.pairs({ins.parts[0]!r}, {reads})")

    def op_mul(self, ins, args, parts):
        kind = parts[-1]
        if kind == "f32x2":
            self._pairs(ins, args)
            return
        a, b = (self.read(x, kind) for x in args[1:3])
        self.write(args[0], *self._product(kind, parts, a, b))

    def _product(self, kind, parts, a, b) -> tuple[str, str]:
        if "wide" in parts:
            wide = f"{kind[0]}{2 * width_of(kind)}"
            return wide, f"{a}.astype(np.{np.dtype(NUMPY[VIEWS[wide]]).name}) * {b}"
        if "hi" in parts:
            return kind, f"alu.mul_hi({a}, {b})"
        return kind, f"{a} * {b}"

    def op_mad(self, ins, args, parts):
        kind = parts[-1]
        a, b = (self.read(x, kind) for x in args[1:3])
        out, product = self._product(kind, parts, a, b)
        self.write(args[0], out, f"{product} + {self.read(args[3], out)}")

    def op_fma(self, ins, args, parts):
        if parts[-1] == "f32x2":
            self._pairs(ins, args)
            return
        if parts[-1] != "f32":
            raise Unsupported(str(ins))
        self.write(args[0], "f32", "alu.fma32({}, {}, {})".format(*(self.read(x, "f32") for x in args[1:4])))

    def op_div(self, ins, args, parts):
        kind = parts[-1]
        a, b = (self.read(x, kind) for x in args[1:3])
        self.write(args[0], kind, f"{a} / {b}" if kind[0] == "f" else f"alu.quotient({a}, {b})")

    def op_rem(self, ins, args, parts):
        kind = parts[-1]
        self.write(args[0], kind, "alu.remainder({}, {})".format(*(self.read(x, kind) for x in args[1:3])))

    def op_min(self, ins, args, parts):
        kind = parts[-1]
        name = f"{'f' if kind[0] == 'f' and 'NaN' not in parts else ''}{ins.parts[0]}"
        name = name if name.startswith("f") else {"min": "minimum", "max": "maximum"}[name]
        self.write(args[0], kind, "np.{}({}, {})".format(name, *(self.read(x, kind) for x in args[1:3])))

    op_max = op_min

    def op_rcp(self, ins, args, parts):
        self.write(args[0], "f32", f"np.float32(1) / {self.read(args[1], 'f32')}")

    def op_ex2(self, ins, args, parts):
        self.write(args[0], "f32", f"np.exp2({self.read(args[1], 'f32')})")

    def op_lg2(self, ins, args, parts):
        self.write(args[0], "f32", f"np.log2({self.read(args[1], 'f32')})")

    def op_sqrt(self, ins, args, parts):
        self.write(args[0], "f32", f"np.sqrt({self.read(args[1], 'f32')})")

    def op_shl(self, ins, args, parts):
        kind, bits = parts[-1], width_of(parts[-1])
        a = self.read(args[1], kind)
        if isinstance(args[2], Imm) and 0 <= args[2].value < bits:
            sign = "<<" if ins.parts[0] == "shl" else ">>"
            self.write(args[0], kind, f"{a} {sign} {self._immediate(args[2], kind)}")
        else:
            self.write(args[0], kind, f"alu.{ins.parts[0]}({a}, {self.read(args[2], 'u32')})")

    op_shr = op_shl

    def op_bfe(self, ins, args, parts):
        kind = parts[-1]
        reads = self.read(args[1], kind), self.read(args[2], "u32"), self.read(args[3], "u32")
        self.write(args[0], kind, "alu.bfe({}, {}, {})".format(*reads))

    def op_bfi(self, ins, args, parts):
        self.write(args[0], "b32", "alu.bfi({}, {}, {}, {})".format(*(self.read(x, "b32") for x in args[1:5])))

    def op_prmt(self, ins, args, parts):
        if parts != ["b32"]:
            raise Unsupported(str(ins))
        self.write(args[0], "b32", "alu.prmt({}, {}, {})".format(*(self.read(x, "b32") for x in args[1:4])))

    def op_lop3(self, ins, args, parts):
        reads = [self.read(x, "b32") for x in args[1:4]]
        self.write(args[0], "b32", "alu.lop3({}, {}, {}, {})".format(*reads, args[4].value))

    def op_popc(self, ins, args, parts):
        self.write(args[0], "u32", f"alu.popc({self.read(args[1], parts[-1])})")

    def op_setp(self, ins, args, parts):
        kind = parts[-1]
        if kind.startswith("bf16") or kind.endswith("x2"):
            raise Unsupported(str(ins))
        a, b = (self.read(x, kind) for x in args[1:3])
        test = self._compare(parts[0], kind, a, b)
        join = {"and": "&", "or": "|", "xor": "^"}.get(parts[1])
        first, second = (args[0].first, args[0].second) if isinstance(args[0], Pair) else (args[0], None)
        if second:
            self.line(f"t = {test}")
            test = "t"
        extra = f" {join} {self._predicate(args[3])}" if join else ""
        self.write(first, "pred", f"({test}){extra}")
        if second:
            self.write(second, "pred", f"(~t){extra}")

    def _predicate(self, operand) -> str:
        return self.read(operand, "pred")

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
        self.write(args[0], kind, f"np.where({self._predicate(args[3])}, {a}, {b})")

    def op_mov(self, ins, args, parts):
        kind, target, source = parts[-1], args[0], args[1]
        if isinstance(target, Vec):  # unpack
            part = f"b{width_of(kind) // len(target.items)}"
            self.line(f"t = {self.read(source, kind)}")
            for i, item in enumerate(target.items):
                name = np.dtype(NUMPY[view_of(part)]).name
                self.write(
                    item, part, f"(t >> np.{np.dtype(NUMPY[VIEWS[kind]]).name}({i * width_of(part)})).astype(np.{name})"
                )
        elif isinstance(source, Vec):  # pack
            part, name = f"b{width_of(kind) // len(source.items)}", np.dtype(NUMPY[VIEWS[kind]]).name
            pieces = [
                f"({self.read(item, part)}.astype(np.{name}) << np.{name}({i * width_of(part)}))"
                for i, item in enumerate(source.items)
            ]
            self.write(target, kind, " | ".join(pieces))
        else:
            self.write(target, kind, self.read(source, kind))

    def op_cvta(self, ins, args, parts):
        kind = parts[-1]
        space = parts[-2]
        extra = {"param": " + np.uint64(m.param_window)", "shared": "", "global": ""}[space]
        self.write(args[0], kind, self.read(args[1], kind) + extra)

    def op_cvt(self, ins, args, parts):
        if parts[-2:] == ["bf16x2", "f32"] or parts[-2:] == ["f16x2", "f32"]:
            high, low = (self.read(x, "f32") for x in args[1:3])
            half = "alu.to_bf16({})" if parts[-2] == "bf16x2" else "{}.astype(np.float16).view(np.uint16)"
            high, low = half.format(high), half.format(low)
            self.write(args[0], "b32", f"{high}.astype(np.uint32) << np.uint32(16) | {low}")
            return
        *modes, to, kind = parts
        if set(modes) - {"rn", "rzi", "rni", "rmi", "rpi", "rna", "rz", "sat"}:
            raise Unsupported(str(ins))
        a = self.read(args[1], kind)
        if kind == "bf16":
            a, kind = f"alu.from_bf16({a})", "f32"
        rounding = next((m for m in modes if m.endswith("i")), None)
        if to == "bf16" and kind == "f32" and "rn" in modes:
            value = f"alu.to_bf16({a})"
        elif to == "tf32" and "rna" in modes:
            value = f"alu.to_tf32({a})"
        elif kind[0] == "f" and to[0] in "us":
            value = f"alu.to_int({a}, np.{np.dtype(NUMPY[view_of(to)]).name}, {rounding!r})"
        elif "sat" in modes or "rz" in modes or to in ("bf16", "tf32"):
            raise Unsupported(str(ins))
        elif kind[0] == "f" and to == kind and rounding:
            value = f"{ROUND[rounding]}({a})"
        else:
            value = f"{a}.astype(np.{np.dtype(NUMPY[view_of(to)]).name})"
        self.write(args[0], to, value)

    # Memory

    def _vector(self, parts) -> int:
        return next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)

    def op_ld(self, ins, args, parts):
        kind, space, count = parts[-1], parts[0].split("::")[0], self._vector(parts)
        if space == "param":
            size = width_of(kind) // 8
            offset = self.address(args[1].base) + args[1].offset
            targets = args[0].items if isinstance(args[0], Vec) else (args[0],)
            for i, target in enumerate(targets):
                dtype = np.dtype(NUMPY[view_of(kind)]).name
                self.write(target, kind, f"m.parameter({offset + i * size}, np.{dtype})")
            return
        if space not in ("global", "shared"):
            raise Unsupported(str(ins))
        size = width_of(kind) // 8
        targets = args[0].items if isinstance(args[0], Vec) else (args[0],)
        if len(targets) != count:
            raise Unsupported(str(ins))
        address = self.memory(args[1])
        self.line(f"t = m.ld_{space}({self.const(ins)}, S, {address}, {size * count})")
        self.line(f"t = t.view(np.{np.dtype(NUMPY[view_of(kind)]).name})")
        for i, target in enumerate(targets):
            self.write(target, kind, f"t[:, {i}]")

    def op_st(self, ins, args, parts):
        kind, space, count = parts[-1], parts[0].split("::")[0], self._vector(parts)
        if space not in ("global", "shared"):
            raise Unsupported(str(ins))
        sources = args[1].items if isinstance(args[1], Vec) else (args[1],)
        if len(sources) != count:
            raise Unsupported(str(ins))
        dtype = np.dtype(NUMPY[view_of(kind)]).name
        values = ", ".join(self.read(x, kind) for x in sources)
        address = self.memory(args[0])
        self.line(
            f"m.st_{space}({self.const(ins)}, S, {address}, {width_of(kind) // 8 * count}, np.{dtype}, ({values},))"
        )

    def op_cp(self, ins, args, parts):
        op = ins.op
        if op.startswith("cp.async.bulk"):
            self._bulk(ins, args, op)
        elif "commit_group" in parts:
            self.line("m.cp_commit(S)")
        elif "wait_group" in parts:
            self.line(f"m.cp_wait(S, {args[0].value})")
        elif "wait_all" in parts:
            self.line("m.cp_commit(S)")
            self.line("m.cp_wait(S, 0)")
        elif op.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
            size = self.read(args[3], "u32") if len(args) > 3 else "None"
            if len(args) > 3 and isinstance(args[3], Reg) and args[3].kind == "p":
                raise Unsupported(f"{ins}: ignore-src")
            target, source = self.memory(args[0]), self.memory(args[1])
            self.line(f"m.cp_async({self.const(ins)}, S, {target}, {source}, {args[2].value}, {size})")
        else:
            raise Unsupported(str(ins))

    def op_ldmatrix(self, ins, args, parts):
        self._matrix_form(ins, parts)
        self.line(
            f"t = m.ldmatrix({self.const(ins)}, S, {self.memory(args[1])}, {len(args[0].items)}, {'trans' in parts})"
        )
        for i, target in enumerate(args[0].items):
            self.write(target, "b32", f"t[{i}]")

    def op_stmatrix(self, ins, args, parts):
        self._matrix_form(ins, parts)
        values = ", ".join(self.read(x, "b32") for x in args[1].items)
        self.line(f"m.stmatrix({self.const(ins)}, S, {self.memory(args[0])}, [{values}], {'trans' in parts})")

    def _matrix_form(self, ins, parts):
        if "m8n8" not in parts or parts[-1] != "b16":
            raise Unsupported(str(ins))

    # Other lanes

    def op_mma(self, ins, args, parts):
        m = re.fullmatch(r"m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", ".".join(parts))
        if not m:
            raise Unsupported(str(ins))
        a, b = ("[" + ", ".join(self.read(x, "b32") for x in v.items) + "]" for v in args[1:3])
        c = "[" + ", ".join(self.read(x, "b32") for x in args[3].items) + "]"
        self.line(f"t = m.mma({self.const(ins)}, S, {a}, {b}, {c}, {m[2]!r})")
        for i, target in enumerate(args[0].items):
            self.write(target, "b32", f"t[:, {i}]")

    def op_shfl(self, ins, args, parts):
        target, inside = (args[0].first, args[0].second) if isinstance(args[0], Pair) else (args[0], None)
        a = self.read(args[1], "b32")
        b, c = (self.read(x, "u32") for x in args[2:4])
        self.line(f"t, inside = m.shfl({self.const(ins)}, S, {a}, {b}, {c}, {parts[0]!r})")
        self.write(target, "b32", "t")
        if inside:
            self.write(inside, "pred", "inside")

    def op_elect(self, ins, args, parts):
        self.line(f"t, inside = m.elect({self.const(ins)}, S)")
        self.write(args[0].first, "b32", "t")
        self.write(args[0].second, "pred", "inside")

    def op_vote(self, ins, args, parts):
        if parts[-1] != "b32":
            self.line(f"t = m.vote({self.const(ins)}, S, {self._predicate(args[1])}, {parts[0]!r})")
            self.write(args[0], "pred", "t")
        else:
            self.line(f"t = m.ballot({self.const(ins)}, S, {self._predicate(args[1])})")
            self.write(args[0], "b32", "t")

    # sm_90

    def op_fence(self, ins, args, parts):
        if parts[0] == "proxy" and parts[1] == "async":
            self.line("m.fence_proxy(S)")
        elif parts[0] not in ("mbarrier_init", "acq_rel", "sc"):
            raise Unsupported(str(ins))

    def op_membar(self, ins, args, parts):
        pass  # nothing here reorders memory

    def op_nanosleep(self, ins, args, parts):
        pass

    def op_griddepcontrol(self, ins, args, parts):
        pass  # kernels run one after another

    def op_setmaxnreg(self, ins, args, parts):
        pass

    def op_prefetch(self, ins, args, parts):
        pass

    def op_mbarrier(self, ins, args, parts):
        k = self.const(ins)
        name = parts[0]
        if name == "init":
            self.line(f"m.mbarrier_init({k}, S, {self.memory(args[0])}, {self.read(args[1], 'u32')})")
        elif name == "inval":
            self.line(f"m.mbarrier_inval({k}, S, {self.memory(args[0])})")
        elif name in ("arrive", "expect_tx"):
            where = args[1] if name == "arrive" else args[0]
            if name == "arrive" and args[0] != SINK and "expect_tx" not in parts and args[0].kind != "64":
                raise Unsupported(str(ins))
            extra = args[2] if name == "arrive" and len(args) > 2 else args[1] if name == "expect_tx" else None
            tx = self.read(extra, "u32") if "expect_tx" in parts else "None"
            count = self.read(extra, "u32") if extra and "expect_tx" not in parts else "None"
            self.line(f"m.mbarrier_arrive({k}, S, {self.memory(where)}, {tx}, {count}, {name == 'arrive'})")
        elif name in ("try_wait", "test_wait") and "parity" in parts:
            self.line(f"t = m.mbarrier_wait({k}, S, {self.memory(args[1])}, {self.read(args[2], 'u32')})")
            self.write(args[0], "pred", "t")
        else:
            raise Unsupported(str(ins))

    def _bulk(self, ins, args, op):
        k = self.const(ins)
        if op == "cp.async.bulk.commit_group":
            self.line("m.bulk_commit(S)")
        elif op in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
            self.line(f"m.bulk_wait(S, {args[0].value})")
        elif re.fullmatch(
            r"cp\.async\.bulk\.tensor\.\dd\.shared::(cta|cluster)\.global(\.tile)?\.mbarrier::complete_tx::bytes", op
        ):
            coords = ", ".join(self.read(c, "s32") for c in args[1].coords)
            maps = self.memory(Mem(args[1].base, args[1].offset))
            self.line(f"m.tma_load({k}, S, {self.memory(args[0])}, {maps}, ({coords},), {self.memory(args[2])})")
        elif re.fullmatch(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta(\.tile)?\.bulk_group", op):
            coords = ", ".join(self.read(c, "s32") for c in args[0].coords)
            maps = self.memory(Mem(args[0].base, args[0].offset))
            self.line(f"m.tma_store({k}, S, {maps}, ({coords},), {self.memory(args[1])})")
        else:
            raise Unsupported(str(ins))

    def op_wgmma(self, ins, args, parts):
        k = self.const(ins)
        if parts[0] == "fence":
            self.line(f"m.wgmma_fence({k}, S)")
        elif parts[0] == "commit_group":
            self.line(f"m.wgmma_commit({k}, S)")
        elif parts[0] == "wait_group":
            self.line(f"m.wgmma_wait({k}, S, {args[0].value})")
        else:
            m = re.fullmatch(r"mma_async\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", ".".join(parts))
            if not m:
                raise Unsupported(str(ins))
            in_registers = isinstance(args[1], Vec)
            a = tuple(r.index for r in args[1].items) if in_registers else self.read(args[1], "b64")
            flags = [x.value for x in args[4:]]
            if flags[:2] != [1, 1]:
                raise Unsupported(f"{ins}: negated operands")
            trans = ([0] if in_registers else []) + flags[2:] if flags[2:] else [0, 0]
            d = tuple(r.index for r in args[0].items)
            self.line(
                f"m.wgmma({k}, S, {d}, {a}, {self.read(args[2], 'b64')}, {self._predicate(args[3])}, "
                f"{int(m[1])}, {int(m[2])}, {m[3]!r}, {tuple(trans)})"
            )
