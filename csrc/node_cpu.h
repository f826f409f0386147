// Path `cpu` in the node: what fastlora/paths/cpu.py does, with the same kernels and ATen calls.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "call.h"
#include "layer.h"

namespace fastlora::cpu {

inline const Kernels* kernels = nullptr;  // given once by `prepare`

inline Dtype dtype(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat ? FLOAT32 : type == at::kBFloat16 ? BFLOAT16 : type == at::kHalf ? FLOAT16 : DTYPES;
}
inline bool takes(const Tensor& t) { return dtype(t) != DTYPES; }

// (..., K) as (M, K) with the elements of a row side by side.
inline Tensor dense_rows(const Tensor& t) {
  const Tensor two = rows_of(t);
  return two.stride(1) == 1 ? two : two.contiguous();
}

inline Dropout dropout(double p, const Tensor& seed) {
  return seed.defined() ? Dropout::with(p, *seed.const_data_ptr<std::int64_t>()) : Dropout::none();
}

inline Result forward(const Layer& layer) {
  const Tensor rows = dense_rows(layer.x), A = layer.lora_A.contiguous(), B = layer.lora_B.contiguous();
  Call call{};
  call.M = rows.size(0);
  call.K = rows.size(1);
  call.N = B.size(0);
  call.R = call.rank_stride = static_cast<int>(B.size(1));
  const Tensor S = at::empty({call.M, call.R}, layer.x.options());
  Tensor y;
  if (layer.x.dim() == 2) {
    y = at::linear(layer.x, layer.weight, layer.bias.defined() ? std::optional<Tensor>(layer.bias) : std::nullopt);
  } else {  // at::linear would return a view here, on which autograd forbids in-place operations
    auto shape = layer.x.sizes().vec();
    shape.back() = call.N;
    y = at::empty(shape, layer.x.options());
    Tensor two = y.view({call.M, call.N});
    if (layer.bias.defined())
      at::addmm_out(two, layer.bias, rows, layer.weight.t());
    else
      at::mm_out(two, rows, layer.weight.t());
  }
  call.y = y.data_ptr();
  call.x = rows.const_data_ptr();
  call.x_stride = rows.stride(0);
  call.lora_A = A.const_data_ptr();
  call.lora_B = B.const_data_ptr();
  call.S = S.data_ptr();
  call.scaling = static_cast<float>(layer.scaling);
  call.threads = at::get_num_threads();
  call.dropout = dropout(layer.p, layer.seed);
  call.dtype = dtype(layer.x);
  call.adapter_dtype = dtype(A);
  TORCH_CHECK(kernels->forward(call), "fastlora: out of memory");
  return {y, S};
}

// dx is added to `onto` (M, K), where that is defined.
inline Gradients backward(const Incoming& in, const Tensor& onto = Tensor()) {
  const Tensor rows = dense_rows(in.dy), A = in.lora_A.contiguous(), B = in.lora_B.contiguous();
  const Tensor S = in.S.contiguous();
  Tensor x_rows;
  Gradients found;
  Call call{};
  call.M = rows.size(0);
  call.N = rows.size(1);
  call.K = A.size(1);
  call.R = call.rank_stride = static_cast<int>(A.size(0));
  if (in.x.defined()) {
    x_rows = dense_rows(in.x);
    found.dA = at::empty_like(A);
    call.x = x_rows.const_data_ptr();
    call.x_stride = x_rows.stride(0);
    call.dA = found.dA.data_ptr();
  }
  if (in.need_B) {
    found.dB = at::empty_like(B);
    call.dB = found.dB.data_ptr();
  }
  call.dtype = dtype(rows);
  call.adapter_dtype = dtype(A);
  call.add = onto.defined() || call.dtype != FLOAT32;  // as in fastlora/paths/cpu.py
  if (in.weight.defined()) {
    found.dx = onto.defined() ? onto
               : call.add     ? at::mm(rows, in.weight)
                              : at::empty({call.M, call.K}, rows.options());
    call.dx = found.dx.data_ptr();
  }
  call.dy = rows.const_data_ptr();
  call.dy_stride = rows.stride(0);
  call.lora_A = A.const_data_ptr();
  call.lora_B = B.const_data_ptr();
  call.S = const_cast<void*>(S.const_data_ptr());
  call.scaling = static_cast<float>(in.scaling);
  call.threads = at::get_num_threads();
  call.dropout = dropout(in.p, in.seed);
  TORCH_CHECK(kernels->backward(call), "fastlora: out of memory");
  if (in.weight.defined() && (onto.defined() || !call.add)) found.dx.addmm_(rows, in.weight);
  return found;
}

}  // namespace fastlora::cpu
