// One call of the layer, as the autograd node sees it, whatever computes it.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

struct _object;  // Python's PyObject

namespace fastlora {

using at::Tensor;
typedef std::optional<Tensor> Optional;

// What forward is given; `seed` is undefined where nothing is dropped.
struct Layer {
  const Tensor &x, &weight, &lora_A, &lora_B;
  const Optional& bias;
  double scaling, p;
  Tensor seed;
  _object* packed = nullptr;  // what weight was dequantised from: kept for backward in its place
};

struct Result {
  Tensor y, S;
};

// What backward is given: x is undefined where no dA is asked for, weight where no dx is.
struct Incoming {
  const Tensor& dy;
  Tensor x, weight, lora_A, lora_B, S, seed;
  double scaling, p;
  bool need_B;
};

// Undefined where not asked for; dx is (M, K).
struct Gradients {
  Tensor dx, dA, dB;
};

// (..., K) as (M, K).
inline Tensor rows_of(const Tensor& t) { return t.dim() == 2 ? t : t.dim() > 2 ? t.flatten(0, -2) : t.unsqueeze(0); }

}  // namespace fastlora
