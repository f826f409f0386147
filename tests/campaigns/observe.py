"""Run one `Case` as its mode says and hold everything that comes out against the reference, by the error rule."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
import fastlora.peft
from fastlora import accuracy, autograd, functional, packed
from fastlora.accuracy import Inputs
from fastlora.base_layer import packed_of
from fastlora.choice import select
from fastlora.errors import FastLoRAWarning
from fastlora.paths import cpu
from fastlora.paths.problem import draw_seed

from .bases import COLUMNS, dequantised, dora_known, magnitude_of, quantise
from .case import INSTRUCTIONS, KERNELS, LAID, TRANSFORMS, Case, tensors

GRADIENTS = {"X": "dX", "A": "dA", "B": "dB", "b": "dbias", "m": "dm"}

near: list[Case] = []  # beyond the rule, but within the roundings of sums in another order; see `_judged`


class Wrong(Exception):
    """Something that must hold exactly does not."""


def faults(case: Case) -> list[str]:
    """Everything that is wrong with the case; empty when all is right. An unforeseen exception is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastLoRAWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, on infinities in the interpreter
        warnings.filterwarnings("ignore", message=".*(create_graph=True|gradient layout contract).*")
        try:
            with _arranged(case):
                return _faults(case)
        except Exception as error:
            return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]


def _faults(case: Case) -> list[str]:
    if case.dora and case.K < COLUMNS:
        return []
    inputs, base = tensors(case), None
    if case.base:
        base = quantise(case.base, inputs.weight)
        inputs = replace(inputs, weight=dequantised(base, inputs.weight.dtype))
    if case.dropout:
        inputs = replace(inputs, dropout_p=case.dropout, mask=_mask(case, inputs))
    face = Face(case, inputs, base)
    if case.mode in TRANSFORMS:
        return _transformed(case, inputs, face)
    torch.manual_seed(case.seed)
    if case.mode in ("no_grad", "inference"):
        with torch.no_grad() if case.mode == "no_grad" else torch.inference_mode():
            y = face(face.leaves["X"])
        _require(not y.requires_grad, "requires a gradient")
        found = _judged(case, {"Y": y.clone()}, inputs)
    elif case.mode == "autocast":
        found = _judged(case, *_autocast(case, inputs, face))
    elif case.mode == "create_graph":
        found = _twice(case, inputs, face)
    else:
        found = _judged(case, getattr(_Modes, case.mode)(case, inputs, face), inputs)
    face.check_counts()
    return found


def _judged(case: Case, got: dict[str, Tensor], inputs: Inputs, known: accuracy.Expected | None = None) -> list[str]:
    """What breaks the rule. What breaks it in the last place only is kept in `near`, and counted apart.

    The rule grants two units where eager's own error does not speak. But the update is added to the base term by term,
    R roundings at the size of the sum where eager has one: R / 2 units at most, which show in float32 and float64 when
    the base is much the larger and its own sum short. And a sum of n terms in another order may differ by n / 2 units:
    float64 has no finer truth to tell, and the roundings of equal terms, where two tensors repeat one number, do not
    average out.
    """
    if known is None:
        known = dora_known(inputs, magnitude_of(case, inputs)) if case.dora else accuracy.expected(inputs)
    found = accuracy.violations(got, inputs, known=known)
    if found and case.dtype in ("f32", "f64"):
        equal = sum(getattr(case, name) in ("expanded", "broadcast") for name in LAID) > 1
        longest = max(case.N, case.K, inputs.x.shape[:-1].numel())
        terms = case.R + (longest if case.dtype == "f64" or equal else 0)
        if not accuracy.violations(got, inputs, units=2.0 + terms / 2, known=known):
            near.append(case)
            return []
    return found


def _mask(case: Case, inputs: Inputs) -> Tensor:
    """The mask that the next call after `torch.manual_seed(case.seed)` draws."""
    x, weight = inputs.x, inputs.weight
    if x.numel() == 0:
        return torch.ones(x.shape, dtype=torch.bool)
    if case.dora:  # which drops elements of x itself
        torch.manual_seed(case.seed)
        return F.dropout(torch.ones_like(x), case.dropout) != 0
    if case.mode == "autocast" and case.dtype != "f64":
        x, weight = x.to(_low(case)), weight.to(_low(case))
    path = select(x, weight, inputs.lora_A, case.dropout, case.path)
    torch.manual_seed(case.seed)
    return path.mask(draw_seed(x.device), x.shape[:-1].numel(), x.shape[-1], case.dropout).view(x.shape)


class Face:
    """The public face under test: `face(x)`, with `leaves` X, A, B, b that ask for gradients as the case wants."""

    def __init__(self, case: Case, inputs: Inputs, base: nn.Module | None, leaves: dict[str, Tensor] | None = None):
        self.case, self.inputs, self.base, self.module = case, inputs, base, None
        sources = {"X": inputs.x, "A": inputs.lora_A, "B": inputs.lora_B, "b": inputs.bias}
        sources["m"] = magnitude_of(case, inputs) if case.dora else None
        self.leaves = leaves or {
            name: t.detach().requires_grad_(name in case.wants) if name == "X" else nn.Parameter(t, name in case.wants)
            for name, t in sources.items()
            if t is not None
        }
        self.scaling = torch.tensor(case.scaling, dtype=torch.float64) if case.scaling_is == "tensor" else case.scaling
        if case.face != "function":
            self.module = getattr(self, case.face)()

    def __call__(self, x: Tensor) -> Tensor:
        if self.module is None:
            return self.function(x, self.leaves["A"], self.leaves["B"], self.leaves.get("b"))
        with forced(self.case.path):
            return self.module(x)

    def function(self, x, lora_A, lora_B, bias) -> Tensor:
        weight = self.inputs.weight if self.base is None else packed_of(self.base, self.inputs.weight.dtype)
        arguments = (x, weight, lora_A, lora_B, bias, self.scaling, self.inputs.dropout_p)
        return fastlora.lora_linear(*arguments, path=self.case.path)

    def _base(self, module: nn.Module, weight: Tensor) -> nn.Module:
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.bias = self.leaves.get("b")
        return module

    def _linear(self) -> nn.Module:
        if self.base is not None:
            self.base.bias = self.leaves.get("b")
            return self.base
        return self._base(nn.Linear(self.case.K, self.case.N, device="meta"), self.inputs.weight)

    def layer(self) -> nn.Module:
        case, A, B = self.case, self.leaves["A"], self.leaves["B"]
        layer = fastlora.FusedLoRALinear.from_linear(
            self._linear(), r=case.R, scaling=case.scaling, adapter_dtype=A.dtype, use_dora=case.dora
        )
        if case.dora:
            layer.lora_magnitude_vector = self.leaves["m"]
        layer.lora_dropout, layer.lora_A, layer.lora_B = self.inputs.dropout_p, A, B
        if "b" in self.leaves:
            layer.bias.requires_grad_("b" in case.wants)
        return layer

    def peft(self, base: nn.Module | None = None) -> nn.Module:
        from peft import LoraConfig
        from peft.tuners import lora

        case = self.case
        config = LoraConfig(r=case.R, lora_dropout=self.inputs.dropout_p, init_lora_weights=False, use_dora=case.dora)
        conv = {"is_target_conv_1d_layer": True, "fan_in_fan_out": True} if base is not None else {}
        config.fan_in_fan_out = base is not None
        kind = {None: lora.Linear, "int8": lora.Linear8bitLt}.get(case.base) or lora.Linear4bit
        layer = kind(base or self._linear(), "default", config, r=case.R, lora_alpha=1, **conv)
        layer.scaling["default"] = self.scaling
        if case.dora:
            layer.lora_magnitude_vector["default"].weight = self.leaves["m"]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = self.leaves["A"], self.leaves["B"]
        if "b" in self.leaves:
            layer.base_layer.bias.requires_grad_("b" in case.wants)
        return fastlora.peft.patch(layer)

    def conv1d(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        return self.peft(self._base(Conv1D(self.case.N, self.case.K), self.inputs.weight.t()))

    def check_counts(self) -> None:
        """PEFT's layers must have run our arithmetic, or the case tested nothing."""
        if self.case.face in ("peft", "conv1d"):
            entry = fastlora.peft.report(self.module)[""]
            _require(entry.fused_calls > 0 and entry.fallback_calls == 0, f"PEFT's own forward ran: {entry.reasons}")

    def backward(self, y: Tensor, **keywords) -> dict[str, Tensor]:
        """What was asked for, by the names of `accuracy.run`; nobody else may have got a gradient."""
        wanted = [name for name in self.leaves if name in self.case.wants]
        _require(y.requires_grad == bool(wanted), f"y.requires_grad is {y.requires_grad}")
        if wanted:
            y.backward(self.inputs.dy.to(y.dtype), **keywords)
        for name, leaf in self.leaves.items():
            _require((leaf.grad is not None) == (name in wanted), f"the gradient of {name}")
        return {GRADIENTS[name]: self.leaves[name].grad for name in wanted}


class _Modes:
    """Ways to run forward and backward; each returns what `accuracy.run` would."""

    @staticmethod
    def plain(case, inputs, face):
        y = face(face.leaves["X"])
        return {"Y": y.detach(), **face.backward(y)}

    @staticmethod
    def checkpoint(case, inputs, face, reentrant=False):
        y = checkpoint(face, face.leaves["X"], use_reentrant=reentrant)
        return {"Y": y.detach(), **face.backward(y)}

    @staticmethod
    def reentrant(case, inputs, face):
        if "X" not in case.wants:
            return _Modes.plain(case, inputs, face)
        return _Modes.checkpoint(case, inputs, face, reentrant=True)

    @staticmethod
    def retain(case, inputs, face):
        y = face(face.leaves["X"])
        once = {name: g.clone() for name, g in face.backward(y, retain_graph=True).items()}
        _same(once, face.backward(y) if once else {}, "two backward calls")
        return {"Y": y.detach(), **once}

    @staticmethod
    def shared(case, inputs, face):
        """One adapter in two layers: twice the gradient, to the bit."""
        other = Face(case, inputs, face.base, face.leaves)
        torch.manual_seed(case.seed)  # which making it has moved on
        y = face(face.leaves["X"])
        torch.manual_seed(case.seed)
        other_y = other(face.leaves["X"])
        other.check_counts()
        _require(torch.equal(y.nan_to_num(), other_y.nan_to_num()), "two calls differ")
        once = {name: g.clone() for name, g in face.backward(y).items()}
        _same(once, other.backward(other_y), "a shared adapter")
        return {"Y": y.detach(), **once}

    @staticmethod
    def changed(case, inputs, face):
        """What backward needs is changed before it runs: autograd's error, never the gradients of another call."""
        y = face(face.leaves["X"])
        needed = [name for name, who in {"X": "A", "A": "X", "B": "AX"}.items() if set(who) & set(case.wants)]
        if case.scaling_is == "tensor":  # what is kept is lora_B times the scaling, and stays right
            needed = [name for name in needed if name != "B"]
        needed = [name for name in needed if face.leaves[name].is_contiguous()]  # the expanded cannot be changed
        if not needed:
            return {"Y": y.detach()}
        leaf = face.leaves[needed[case.seed % len(needed)]].detach()
        before = leaf.clone()
        leaf.add_(1.0)
        try:
            y.backward(inputs.dy.to(y.dtype))
        except RuntimeError as error:
            _require("modified by an inplace operation" in str(error), str(error))
        else:
            raise Wrong("backward ran with what had been changed")
        leaf.copy_(before)  # whose memory is the inputs'
        return {"Y": y.detach()}

    @staticmethod
    def kept_elsewhere(case, inputs, face):
        """Hooks that off-load what is kept bring other tensors back, with the same numbers."""
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            y = face(face.leaves["X"])
        return {"Y": y.detach(), **face.backward(y)}

    @staticmethod
    def other_thread(case, inputs, face):
        y, got, errors = face(face.leaves["X"]), {}, []

        def work():
            try:
                got.update(face.backward(y))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return {"Y": y.detach(), **got}


def _same(once: dict[str, Tensor], twice: dict[str, Tensor], what: str) -> None:
    for name, g in once.items():
        _require(torch.equal((g + g).nan_to_num(), twice[name].nan_to_num()), f"{name} of {what}")


def _second_of_eager(inputs: Inputs, wants: str) -> dict[str, Tensor]:
    sources = {"X": inputs.x, "A": inputs.lora_A, "B": inputs.lora_B, "b": inputs.bias}
    leaves = {n: None if t is None else t.detach().requires_grad_(n in wants) for n, t in sources.items()}
    x, A, B, bias = leaves.values()
    arguments = (x, inputs.weight, A, B, bias, inputs.scaling, inputs.dropout_p)
    y = fastlora.reference.lora_linear(*arguments, mask=inputs.mask)
    return _second(y, {name: t for name, t in leaves.items() if t is not None and name in wants}, inputs.dy)


def _second(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y, its gradients, and those of the sum of each gradient times its own tensor, with respect to all of them and
    dy; zero where nothing depends on it."""
    dy = dy.detach().to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves.values(), dy, create_graph=True)
    total = sum((g * t.detach()).sum() for g, t in zip(first, leaves.values(), strict=True))
    again = torch.autograd.grad(total, [*leaves.values(), dy], allow_unused=True, materialize_grads=True)
    named = {GRADIENTS[name]: g.detach() for name, g in zip(leaves, first, strict=True)}
    return {"Y": y.detach(), **named, **{f"second of {n}": g for n, g in zip([*leaves, "dy"], again, strict=True)}}


def _twice(case: Case, inputs: Inputs, face: Face) -> list[str]:
    """Gradients under create_graph=True, and the gradients of those."""
    y = face(face.leaves["X"])
    wanted = {name: leaf for name, leaf in face.leaves.items() if name in case.wants}
    if not wanted:
        return _judged(case, {"Y": y.detach()}, inputs)
    sizes = replace(inputs.map(lambda t: t.double().abs()), scaling=abs(inputs.scaling))
    known = tuple(_second_of_eager(one, case.wants) for one in (inputs, inputs.map(Tensor.double), sizes))
    return _judged(case, _second(y, wanted, inputs.dy), inputs, known)


def _low(case) -> torch.dtype:
    """The dtype of a case's autocast. Triton's interpreter has no right bfloat16."""
    return torch.bfloat16 if case.seed % 2 and case.path not in KERNELS else torch.float16


def _autocast(case, inputs, face) -> tuple[dict[str, Tensor], Inputs]:
    """What must come out is what the cast tensors give; gradients come back in the leaves' dtypes, exactly."""
    low = _low(case)
    inside = case.seed % 3 == 0
    with torch.autocast("cpu", dtype=low):
        y = face(face.leaves["X"])
        gradients = face.backward(y) if inside else None
    gradients = face.backward(y) if gradients is None else gradients
    if case.dtype == "f64":
        return {"Y": y.detach(), **gradients}, inputs
    _require(y.dtype is low, f"y is {y.dtype}")
    for name, g in gradients.items():
        if name in ("dX", "dbias"):
            gradients[name] = g.to(low)
            _require(torch.equal(gradients[name].to(g.dtype).nan_to_num(), g.nan_to_num()), f"{name} is not of {low}")
    cast = inputs.map(lambda t: t.to(low))
    return {"Y": y.detach(), **gradients}, replace(cast, lora_A=inputs.lora_A, lora_B=inputs.lora_B)


def _transformed(case, inputs, face) -> list[str]:
    """vmap, grad and jvp of torch.func give what the reference gives, or (a forced path) say that they cannot."""
    x, A, B = (face.leaves[name].detach() for name in "XAB")

    def call(x, A, B):
        if face.module is None:
            return face.function(x, A, B, inputs.bias)
        names = {id(face.leaves["A"]): A, id(face.leaves["B"]): B}
        given = {name: names[id(p)] for name, p in face.module.named_parameters() if id(p) in names}
        with forced(case.path):
            return torch.func.functional_call(face.module, given, (x,))

    try:
        if case.mode == "vmap":
            if len(case.lead) == 0 or 0 in case.lead:
                return []
            return _judged(case, {"Y": torch.func.vmap(call, (0, None, None))(x, A, B)}, inputs)
        if case.mode == "jvp":
            _, tangent = torch.func.jvp(lambda x: call(x, A, B), (x,), (x,))
            return _judged(case, {"Y": tangent}, replace(inputs, bias=None))
        loss = torch.func.grad(lambda *a: (call(*a) * inputs.dy).sum(), (0, 1, 2))
        return _judged(case, dict(zip(("dX", "dA", "dB"), loss(x, A, B), strict=True)), inputs)
    except RuntimeError as error:
        if case.path is not None and "a function transform" in str(error):
            return []
        raise


@contextlib.contextmanager
def forced(path: str | None):
    """FASTLORA_PATH set to `path` for a while; modules take no path of their own."""
    with mock.patch.dict(os.environ):
        os.environ.pop("FASTLORA_PATH", None)
        if path is not None:
            os.environ["FASTLORA_PATH"] = path
        yield


@contextlib.contextmanager
def _arranged(case: Case):
    """The node, the threads and the instruction set that the case names, for a while."""
    node, threads = functional.NODE if case.node else None, torch.get_num_threads()
    chunk = 1 << (case.seed % 12 + 4) if case.base else packed._CHUNK  # so that small weights are made in parts too
    with (
        mock.patch.object(functional, "NODE", node),
        mock.patch.object(autograd, "NODE", node),
        mock.patch.object(packed, "_CHUNK", chunk),
    ):
        torch.set_num_threads(case.threads)
        if case.instructions:
            cpu._cpu.use_instructions(case.instructions)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if case.instructions:
                cpu._cpu.use_instructions(INSTRUCTIONS[0])


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)
