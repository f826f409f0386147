"""`FusedLoRALinear`: a frozen linear layer with a LoRA adapter, as a module.

y = x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T
"""

from __future__ import annotations

import math
import operator
from contextlib import contextmanager
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import dora, reference
from fastlora.base_layer import DTYPES, Packed, base_parameters, dense, form_of, logical_dtype, packed_of, weight_of
from fastlora.functional import lora_linear


class FusedLoRALinear(nn.Module):
    """A linear layer whose weight is frozen and whose update of rank `r` is trained, in one fused computation.

    Attributes: `weight` (N, K) and `bias` (N,) or None, frozen; `lora_A` (R, K) and `lora_B` (N, R), trained;
    `scaling`, a float; `lora_dropout`, a probability; `merged`. N is out_features, K in_features, R the rank. Input
    (..., K) in the weight's dtype, output (..., N). lora_A starts Kaiming-uniform as in PEFT, lora_B at zero, so a new
    layer computes exactly what its base computes. With DoRA also `lora_magnitude_vector` (N,), trained, which starts as
    the norms of the weight's rows.

    The state dict speaks of the layer as it is unmerged: `weight` (in the layout of the layer it was made from),
    `bias`, `lora_A`, `lora_B`, under the same names whether the layer is merged or not.

    Args:
        in_features, out_features: K and N, at least 1.
        r: the rank, at least 1.
        lora_alpha: the numerator of the scaling `lora_alpha / r`.
        lora_dropout: probability in [0, 1) that an element of x is dropped from the update while training.
        bias: whether there is a bias.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (Kalajdzievski 2023).
        scaling: the scaling itself; lora_alpha is then ignored and recomputed from it.
        adapter_dtype: the dtype of lora_A and lora_B: the weight's (the default) or float32.
        device, dtype: of the weight, as for `nn.Linear`; float64, float32, bfloat16 or float16.
        use_dora: train the lengths of the rows of weight + update apart from their directions (Liu et al. 2024): see
            `fastlora.dora`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range; the message names it.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    in_features: int
    out_features: int
    lora_dropout: float
    scaling: float
    _lora_linear = staticmethod(lora_linear)
    _dora_linear = staticmethod(dora.dora_linear)
    _siblings = None  # the group of layers that read the same x, see fastlora.siblings
    _quantised: nn.Module | None = None  # the layer taken over, for what it knows of its weight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        scaling: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = _positive_int("in_features", in_features)
        self.out_features = _positive_int("out_features", out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        weight = torch.empty((self.out_features, self.in_features), device=device, dtype=dtype)
        offset = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self._build(weight, offset, r, lora_alpha, lora_dropout, use_rslora, scaling, adapter_dtype, use_dora)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        scaling: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> FusedLoRALinear:
        """The layer over an existing `nn.Linear`, transformers' `Conv1D`, or a linear layer of bitsandbytes (4 or 8
        bits) or torchao (weight only), sharing its weight and bias.

        Nothing is copied: an `nn.Linear`'s own parameters are taken over (and so frozen in `linear` too); a `Conv1D`
        keeps its weight as (K, N), and `weight` is the transposed view (N, K) of the same memory; a quantised weight
        stays as it is, and is dequantised for each product. The adapter starts on the weight's device. The other
        arguments are as for the class.

        Raises:
            TypeError: `linear` is another kind of module, or its weight is neither a plain floating-point parameter nor
                quantised in a way that is known here (parametrised weights are not supported).
        """
        weight, bias, transposed = base_parameters(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if form_of(linear) is not None:
            layer.__dict__["_quantised"] = linear  # out of modules(): its parameters are this layer's
            layer.out_features, layer.in_features = linear.out_features, linear.in_features
        else:
            layer.out_features, layer.in_features = weight.shape
        layer._build(weight, bias, r, lora_alpha, lora_dropout, use_rslora, scaling, adapter_dtype, use_dora)
        layer.fan_in_fan_out = transposed
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def _build(self, weight, bias, r, lora_alpha, lora_dropout, use_rslora, scaling, adapter_dtype, use_dora) -> None:
        dtype = weight.dtype if self._quantised is None else logical_dtype(self._quantised)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        adapter_dtype = dtype if adapter_dtype is None else adapter_dtype
        if adapter_dtype not in (dtype, torch.float32):
            raise ValueError(f"adapter_dtype must be the weight's {dtype} or float32, got {adapter_dtype}")
        self.r = _positive_int("r", r)
        self.lora_dropout = _finite("lora_dropout", lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, got {lora_dropout}")
        self.set_scaling(lora_alpha, use_rslora, scaling)
        self.weight = _frozen(weight)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        place = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty((self.r, self.in_features), **place))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, self.r), **place))
        self.use_dora = bool(use_dora)
        if self.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, **place))
            self.__dict__["_norms"] = dora.Norms()
        self.fan_in_fan_out = False
        self._set_base(None)

    def set_scaling(self, lora_alpha: float = 16, use_rslora: bool = False, scaling: float | None = None) -> None:
        """Set `scaling` to lora_alpha / r, to lora_alpha / sqrt(r), or outright; see the class for the arguments."""
        self.use_rslora = bool(use_rslora)
        divisor = math.sqrt(self.r) if self.use_rslora else self.r
        if scaling is None:
            self.lora_alpha = _finite("lora_alpha", lora_alpha)
            self.scaling = float(self.lora_alpha / divisor)
        else:
            self.scaling = float(_finite("scaling", scaling))
            self.lora_alpha = self.scaling * divisor

    def reset_parameters(self) -> None:
        """Draw all parameters anew: weight and bias as `nn.Linear` does, then the adapter. Unmerges first.

        Raises:
            TypeError: the weight is quantised.
        """
        if self._quantised is not None:
            raise TypeError("a quantised weight cannot be drawn anew: use reset_lora_parameters")
        self.unmerge()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Start the adapter anew: lora_A Kaiming-uniform with a = sqrt(5), lora_B zero, magnitudes the rows' norms."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.use_dora:
            with torch.no_grad():
                norms = dora.row_norms(self._base_weight(), self.lora_A, self.lora_B, self.scaling)
                self.lora_magnitude_vector.copy_(norms)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in the weight's dtype -> (..., N). Merged, it is the plain linear layer: no dropout.

        Over a quantised weight x may be of any floating dtype; the product is in the dtype that the layer taken over
        would compute in."""
        if self._special:
            return self._forward_special(x)
        if self._base is not None:
            return F.linear(x, self.weight, self.bias)
        if self._siblings is not None:
            y = self._siblings.y(self, x)
            if y is not None:
                return y
        try:  # past nn.Module.__getattr__, which costs half a microsecond a name
            own = self._parameters
            weight, bias, A, B = own["weight"], own["bias"], own["lora_A"], own["lora_B"]
        except KeyError:  # pruned or parametrised
            weight, bias, A, B = self.weight, self.bias, self.lora_A, self.lora_B
        return self._lora_linear(x, weight, A, B, bias, self.scaling, self.lora_dropout, self.training)

    def _projection(self, x: Tensor) -> tuple | None:
        """What `fastlora.siblings` computes together with others; None for a call that is more than `lora_linear`."""
        own, kind = self._parameters, type(self)
        if kind is not FusedLoRALinear and (
            kind.forward is not FusedLoRALinear.forward or kind._lora_linear is not FusedLoRALinear._lora_linear
        ):
            return None
        if self._special or self._base is not None or "forward" in self.__dict__ or "weight" not in own:
            return None
        scaling, p = self.scaling, self.lora_dropout if self.training else 0.0
        scaling = scaling if scaling.__class__ is float else float(scaling)
        return (own["weight"], own["lora_A"], own["lora_B"], own["bias"], scaling), p

    def _forward_special(self, x: Tensor) -> Tensor:
        """Over a quantised base, or DoRA."""
        given, weight, bias = x, self.weight, self.bias
        if self._base is not None:
            x = x.to(weight.dtype)
            y = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
            return y if x is given else y.to(given.dtype)
        if self._quantised is not None:
            x, weight, bias = weight_of(self._quantised, x)
        arguments = (x, weight, self.lora_A, self.lora_B, bias, self.scaling, self.lora_dropout, self.training)
        if self.use_dora:
            y = self._dora_linear(*arguments, self.lora_magnitude_vector, self._norms)
        else:
            y = self._lora_linear(*arguments)
        return y if x is given else y.to(given.dtype)

    def _base_weight(self) -> Tensor | Packed:
        """What is unmerged of the weight, (N, K); a quantised one in the dtype that it was quantised from."""
        if self._quantised is not None:
            return packed_of(self._quantised, logical_dtype(self._quantised))
        return self.weight if self._base is None else self._base

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the sum of the base weight and the update."""
        return self._base is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put `base + scaling * lora_B @ lora_A` in the place of `weight`; forward is then one plain linear layer.

        The base weight itself is left untouched and kept beside the merged one until `unmerge` puts it back, so that
        coming back is exact in every dtype and a weight that is shared with another module (a tied embedding) keeps its
        value there. A merged layer therefore holds one weight more. It does not train: the adapter gets no gradient.
        The sum is formed in float32 (float64 for a float64 layer) and rounded once. Merging twice does nothing.

        Raises:
            ValueError: the sum is not finite where the base weight was, or the weight is computed from others (pruned,
                parametrised); the layer is left unmerged.
        """
        if self._base is not None:
            return
        stored = self._parameters.get("weight")
        if stored is None:
            raise ValueError("weight is pruned or parametrised, so it cannot be replaced; the layer is left unmerged")
        base = dense(self._base_weight(), keep=True)
        wide = torch.promote_types(torch.float32, torch.promote_types(base.dtype, self.lora_A.dtype))
        total = torch.addmm(base.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        if self.use_dora:
            total *= (self.lora_magnitude_vector.to(wide) / total.norm(dim=1))[:, None]
        merged = total.to(base.dtype)
        if not base.is_meta and bool((torch.isfinite(base) & ~torch.isfinite(merged)).any()):
            raise ValueError(f"the merged weight is not finite in {base.dtype}; the layer is left unmerged")
        self.weight = nn.Parameter(merged, requires_grad=False)
        self._set_base(stored)

    def unmerge(self) -> None:
        """Put the base weight back: the same parameter, bit for bit. Does nothing when not merged."""
        if self._base is not None:
            self.weight = self._base
            self._set_base(None)

    def requires_grad_(self, requires_grad: bool = True) -> FusedLoRALinear:
        """Turn the adapter's gradients on or off. The weight stays frozen, and the bias as it is."""
        self.lora_A.requires_grad_(requires_grad)
        self.lora_B.requires_grad_(requires_grad)
        if self.use_dora:
            self.lora_magnitude_vector.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}",
        ]
        if self._quantised is not None:
            parts.append(f"base={type(self._quantised).__name__}")
        if self.use_dora:
            parts.append("use_dora=True")
        if self.lora_A.dtype != self._base_weight().dtype:
            parts.append(f"adapter_dtype={self.lora_A.dtype}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)

    def _set_base(self, base: nn.Parameter | None) -> None:
        # Straight into __dict__: kept out of parameters(), and still copied and pickled with the module.
        self.__dict__["_base"] = base
        self.__dict__["_special"] = self._quantised is not None or (self.use_dora and base is None)

    def _apply(self, fn, recurse: bool = True):
        # The kept base weight moves and changes dtype with the rest.
        if self._base is None:
            return super()._apply(fn, recurse)
        self._parameters["_base"] = self.__dict__.pop("_base")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._set_base(self._parameters.pop("_base"))

    def _as_stored(self, base: Tensor) -> Tensor:
        """A base weight (N, K) in the layout of the original layer, which the state dict has, or one of those back."""
        return base.t() if self.fan_in_fan_out else base

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # Nothing of the layer changes meanwhile: another thread may be in forward.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._quantised is not None:  # as the layer taken over would save it
            self._quantised._save_to_state_dict(destination, prefix, keep_vars)
            return
        base = self._parameters.get("weight") if self._base is None else self._base
        if base is not None and self.fan_in_fan_out:
            stored = self._as_stored(base.detach())
            destination[prefix + "weight"] = nn.Parameter(stored, requires_grad=False) if keep_vars else stored
        elif self.merged:
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        with self._stored_weight():
            super()._load_from_state_dict(*args, **kwargs)
        if self.merged:
            self.unmerge()
            self.merge()

    @contextmanager
    def _stored_weight(self):
        """Inside, `weight` is what the state dict speaks of: unmerged, in the layout of the original layer."""
        weight = self._parameters.get("weight")
        if weight is None:  # pruned or parametrised: what it is computed from is loaded
            yield
            return
        base = weight if self._base is None else self._base
        stored = nn.Parameter(self._as_stored(base.detach()), requires_grad=False) if self.fan_in_fan_out else base
        self._parameters["weight"] = stored
        try:
            yield
        finally:
            if self._parameters["weight"] is not stored:  # load_state_dict(assign=True) put another one there
                base = self._parameters["weight"]
                if self.fan_in_fan_out:
                    base = nn.Parameter(self._as_stored(base.detach()), requires_grad=False)
            self._parameters["weight"] = base if self._base is None else weight
            if self._base is not None:
                self._set_base(base)


class EagerLoRALinear(FusedLoRALinear):
    """The same layer computed by the eager reference: what the fused one is compared with."""

    @staticmethod
    def _lora_linear(x, weight, *rest):
        return reference.lora_linear(x, dense(weight, keep=True), *rest)

    @staticmethod
    def _dora_linear(*arguments):
        return dora.eager(*arguments)


def _frozen(tensor: Tensor) -> nn.Parameter:
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    return parameter.requires_grad_(False)


def _positive_int(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value
