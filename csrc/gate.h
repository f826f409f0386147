// The gate at the speed of a call: which tensors are ordinary, and which of them fit together. What does not is left to
// Python, where fastlora/gate.py and arguments.py ask the same, and say what is wrong.

#pragma once

#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "call.h"
#include "layer.h"

namespace fastlora {

// Dense, of a CPU or a CUDA GPU, with memory of its own, not conjugated or negated, and nobody's wrapper: no other key
// is set.
inline bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet on_cpu({DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
                                           DispatchKey::AutocastCPU});
  static const c10::DispatchKeySet on_cuda({DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCUDA,
                                            DispatchKey::AutocastCUDA});
  static const c10::DispatchKeySet cpu(c10::BackendComponent::CPUBit), cuda(c10::BackendComponent::CUDABit);
  // a difference keeps the bit that says whose memory it is
  return (t.key_set() - on_cpu == cpu || t.key_set() - on_cuda == cuda) && t.has_storage();
}

inline bool nobody_watches() {
  return !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

inline bool is_seed(const Tensor& t, double p, c10::Device device) {
  if (!t.defined() || !(p > 0.0)) return !t.defined() && !(p > 0.0);
  return is_plain(t) && t.scalar_type() == at::kLong && t.numel() == 1 && t.device() == device &&
         reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// What fastlora.arguments.check lets pass.
inline bool fits(const Layer& layer) {
  const Tensor &x = layer.x, &weight = layer.weight, &A = layer.lora_A, &B = layer.lora_B, &bias = layer.bias;
  for (const Tensor* t : {&x, &weight, &A, &B})
    if (!is_plain(*t) || t->device() != x.device()) return false;
  if (x.dim() < 1 || weight.dim() != 2 || A.dim() != 2 || B.dim() != 2) return false;
  const int64_t N = weight.size(0), K = weight.size(1), R = A.size(0);
  const auto dtype = x.scalar_type();
  return x.size(-1) == K && A.size(1) == K && B.size(0) == N && B.size(1) == R && R > 0 && R <= MAX_RANK &&
         weight.scalar_type() == dtype && B.scalar_type() == A.scalar_type() &&
         (!bias.defined() || (is_plain(bias) && bias.device() == x.device() && bias.dim() == 1 && bias.size(0) == N &&
                              bias.scalar_type() == dtype)) &&
         layer.p >= 0.0 && layer.p <= 1.0;
}

// Hooks of saved tensors may have changed them, and the kernels read addresses.
inline bool fits(const Incoming& in) {
  const Tensor &dy = in.dy, &A = in.lora_A, &B = in.lora_B, &S = in.S;
  for (const Tensor* t : {&dy, &A, &B, &S})
    if (!is_plain(*t) || t->device() != dy.device()) return false;
  if (dy.dim() < 1 || A.dim() != 2 || B.dim() != 2 || S.dim() != 2) return false;
  const auto dtype = dy.scalar_type();
  const int64_t N = dy.size(-1), M = N ? dy.numel() / N : S.size(0), R = A.size(0), K = A.size(1);
  if (B.scalar_type() != A.scalar_type() || R > MAX_RANK) return false;
  if (S.scalar_type() != dtype || S.size(0) != M || S.size(1) != R || B.size(0) != N || B.size(1) != R) return false;
  if (!is_seed(in.seed, in.p, dy.device())) return false;
  const Tensor &x = in.x, &weight = in.weight;
  if (weight.defined() && (!is_plain(weight) || weight.device() != dy.device() || weight.scalar_type() != dtype ||
                           weight.dim() != 2 || weight.size(0) != N || weight.size(1) != K))
    return false;
  return !x.defined() || (is_plain(x) && x.device() == dy.device() && x.scalar_type() == dtype && x.dim() > 0 &&
                          x.size(-1) == K && (K ? x.numel() / K : M) == M);
}

}  // namespace fastlora
