// One call as the autograd node sees it, whatever computes it: one projection of x, or several that share it.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

struct _object;  // Python's PyObject

namespace fastlora {

using at::Tensor;

constexpr std::size_t MOST = 4;  // projections of a call, as in fastlora/shared.py

// What forward is given for one of them; `bias` may be undefined, and `seed` is where nothing is dropped.
struct Layer {
  Tensor x, weight, lora_A, lora_B, bias, seed;
  double scaling = 1.0, p = 0.0;
  _object* packed = nullptr;  // what weight was dequantised from: kept for backward in its place
};

struct Result {
  Tensor y, S;
};

// What backward is given: x is undefined where no dA is asked for, weight where no dx is.
struct Incoming {
  Tensor dy, x, weight, lora_A, lora_B, S, seed;
  double scaling, p;
  bool need_B;
};

// Undefined where not asked for; dx is (M, K), and of several projections the first one's is the sum.
struct Gradients {
  Tensor dx, dA, dB;
};

// Of each projection of a call. One lies where it is declared, without memory of its own.
typedef c10::SmallVector<Layer, 1> Layers;
typedef c10::SmallVector<Result, 1> Results;
typedef c10::SmallVector<Incoming, 1> Incomings;

inline const Tensor& first(const Layer& layer) { return layer.x; }
inline const Tensor& first(const Incoming& in) { return in.dy; }

// (..., K) as (M, K).
inline Tensor rows_of(const Tensor& t) { return t.dim() == 2 ? t : t.dim() > 2 ? t.flatten(0, -2) : t.unsqueeze(0); }

}  // namespace fastlora
