"""Layers of a model that read one and the same x: the first that is called computes all, the others hand over theirs.

`inject` and `fastlora.peft.patch` look for them by architecture: query, key and value, or gate and up, of a module of
transformers that has one input. What was computed for a layer is handed over when it is called with that very tensor,
unchanged since (in-place writes through `.data` are not seen, as autograd does not see them), in the same mode and with
the same parameters; otherwise it computes alone. So the numbers are those of the layers one by one, hooks on each layer
run, and a group never waits for anything: each thread has its own outputs, of one call at most, dropped at the next. A
layer for which twice in a row was computed in vain leaves, and a group that cannot be computed together tries again
ever more rarely. All of it is off unless `siblings.on` is set; and off under
hooks of saved tensors (checkpoints without reentry, offloading) and for a group of which one has forward pre-hooks.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastlora.shared import One, together

FAMILIES = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)
_TWO_INPUTS = ("key_value_states", "encoder_hidden_states")  # of a forward whose key and value may read another tensor
_IN_VAIN = 2
_LONGEST = 255  # calls between two tries of a group that could not be computed together
on = False  # until a GPU has shown that it pays: on a CPU handing over costs as much as it saves


class _Local(threading.local):
    held: _Held | None = None


class _Held:
    """What one thread has computed and not yet handed over: by layer what y was computed with, its state, and y."""

    __slots__ = ("address", "mode", "version", "x", "ys")

    def __init__(self, x: Tensor, mode: tuple, ys: dict[int, tuple[tuple, tuple, Tensor]]) -> None:
        self.x, self.version, self.address, self.mode, self.ys = x, x._version, x.data_ptr(), mode, ys

    def of(self, x: Tensor, mode: tuple) -> bool:
        return self.x is x and self.version == x._version and self.address == x.data_ptr() and self.mode == mode


class Siblings:
    """Layers that share x: `members` are (layer, its name in the model).

    A layer has a method `_projection(x)`: ((weight, lora_A, lora_B, bias, scaling), dropout_p) of a call that is to be
    computed by `lora_linear` and nothing else, or None.
    """

    def __init__(self, members: tuple[tuple[nn.Module, str], ...], parent: nn.Module | None = None) -> None:
        self.members, self._missed, self._local = members, {}, _Local()
        self._parent = None if parent is None else weakref.ref(parent)  # the module that holds them
        self._shared, self._pause, self._wait = False, 0, 0  # the last call; calls until the next try, and after it

    def __getstate__(self) -> dict:
        return {"members": self.members}  # a copy has computed nothing

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __deepcopy__(self, memo: dict) -> Siblings | None:
        parent = None if self._parent is None else memo.get(id(self._parent()))
        if self._parent is not None and parent is None:
            return None  # of one layer, whose copy is not to hold copies of the others
        other = memo[id(self)] = Siblings((), parent)
        other.members = copy.deepcopy(self.members, memo)
        return other

    def names(self, layer: nn.Module) -> tuple[str, ...]:
        """Of those that `layer` was last computed with, its own among them; () where it is computed alone."""
        members = self.members
        shared = self._shared and len(members) > 1 and any(one is layer for one, _ in members)
        return tuple(name for _, name in members) if shared else ()

    def leave(self, layer: nn.Module) -> None:
        """From now on `layer` computes alone."""
        self.members = tuple(one for one in self.members if one[0] is not layer)

    def y(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """y of `layer`, computed now or before; None where it is to be computed alone."""
        if x.__class__ is not Tensor or not on or is_compiling() or x.is_inference():
            return None
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None  # a checkpoint, say, of one of them, which it would compute again alone
        held, mode = self._local.held, _mode(x)
        if held is not None:
            found = held.ys.get(id(layer))
            if found is not None and held.of(x, mode):
                own = layer._projection(x)
                if own is not None and _same(own, found[0]) and _state(own) == found[1]:
                    return self._handed_over(held, layer)
            self._drop(held)
        members = self.members
        if len(members) < 2 or not any(one is layer for one, _ in members):
            return None
        if self._pause:
            self._pause -= layer is members[0][0]  # counted and ended by the first, who alone never misses
            if self._pause or layer is not members[0][0]:
                return None
        y = self._computed(members, layer, x, mode)
        self._shared = y is not None
        self._wait = 0 if self._shared else min(2 * self._wait + 1, _LONGEST)
        self._pause = self._wait
        return y

    def _handed_over(self, held: _Held, layer: nn.Module) -> Tensor:
        y = held.ys.pop(id(layer))[2]
        if self._missed:
            self._missed.pop(id(layer), None)
        if not held.ys:
            self._local.held = None
        return y

    def _drop(self, held: _Held) -> None:
        """They did not come, or not as they were expected."""
        self._local.held = None
        for key in held.ys:
            self._missed[key] = self._missed.get(key, 0) + 1
        self.members = tuple(one for one in self.members if self._missed.get(id(one[0]), 0) < _IN_VAIN)

    def _computed(self, members: tuple, layer: nn.Module, x: Tensor, mode: tuple) -> Tensor | None:
        found = [None if one._forward_pre_hooks else one._projection(x) for one, _ in members]
        first = found[0]
        for own in found:
            if own is None or own[1] != first[1] or any(t is not None and t.is_inference() for t in own[0][:4]):
                return None
        states = list(map(_state, found))  # before anything else can change them
        ys = together(x, [own[0] for own in found], first[1])
        if ys is None:
            return None
        held = {id(one): each for (one, _), each in zip(members, zip(found, states, ys, strict=True), strict=True)}
        y = held.pop(id(layer))[2]
        self._local.held = _Held(x, mode, held)
        return y


def _mode(x: Tensor) -> tuple:
    """What beside tensors decides what is computed, and where."""
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    dtype = autocast and torch.get_autocast_dtype(x.device.type)
    queue = None
    if x.is_cuda:
        queue = torch._C._cuda_getCurrentRawStream(x.device.index), torch.cuda.is_current_stream_capturing()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype, queue


def _same(own: tuple[One, float], before: tuple[One, float]) -> bool:
    (weight, lora_A, lora_B, bias, scaling), p = own
    one, other = before[0], before[1]
    same = weight is one[0] and lora_A is one[1] and lora_B is one[2] and bias is one[3]
    return same and scaling == one[4] and p == other


def _state(own: tuple[One, float]) -> tuple:
    """What changes of tensors that stay the same: versions only grow, so their sum tells."""
    weight, lora_A, lora_B, bias, _ = own[0]
    versions = weight._version + lora_A._version + lora_B._version + (0 if bias is None else bias._version)
    places = weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(), None if bias is None else bias.data_ptr()
    return versions, places, lora_A.requires_grad, lora_B.requires_grad


def join(model: nn.Module, takes: Callable[[nn.Module], bool]) -> None:
    """Make groups of the layers of `model` that `takes` accepts."""
    for prefix, parent in model.named_modules():
        if not _one_input(prefix, parent):
            continue
        for family in FAMILIES:
            found = {name: parent._modules.get(name) for name in family}
            found = {name: layer for name, layer in found.items() if layer is not None and takes(layer)}
            layers = list(found.values())
            if len(layers) > 1 and len(set(map(id, layers))) == len(layers):
                names = [f"{prefix}.{name}".lstrip(".") for name in found]
                group = Siblings(tuple(zip(layers, names, strict=True)), parent)
                for layer in layers:
                    layer.__dict__["_siblings"] = group


def together_with(layer: nn.Module) -> tuple[str, ...]:
    """The names of the layers that `layer` was last computed with, itself among them; () if it was alone."""
    group = layer.__dict__.get("_siblings")
    return () if group is None else group.names(layer)


def _one_input(name: str, parent: nn.Module) -> bool:
    kind = type(parent)
    if not kind.__module__.startswith("transformers.models.") or "cross" in (name + kind.__name__).lower():
        return False
    return not any(other in inspect.signature(kind.forward).parameters for other in _TWO_INPUTS)
