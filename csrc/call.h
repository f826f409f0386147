// One call of the rank terms, and where to find the kernels that compute them: what cpu.cpp and node.cpp share.

#pragma once

#include <cstdint>

namespace fastlora {

constexpr int MAX_RANK = 128;

struct Dropout {
  bool on;
  std::uint64_t seed;
  std::uint32_t threshold;  // an element is dropped when its 16 random bits are below
  float scale;              // of what is kept: 1 / (1 - p)

  static Dropout none() { return {false, 0, 0, 1.0f}; }
  static Dropout with(double p, std::int64_t seed) {
    return {true, static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(p * 65536.0 + 0.5),
            p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
  }
};

enum Dtype : int { FLOAT32, BFLOAT16, FLOAT16, DTYPES };

// Row-major with rows of the given stride, or dense where there is none.
struct Call {
  Dtype dtype, adapter_dtype;  // of x, S, y, dy and dx; of lora_A, lora_B, dA and dB
  const void *x, *dy, *lora_A, *lora_B;
  void *S, *y, *dx, *dA, *dB;
  std::int64_t x_stride, dy_stride, M, N, K;
  int R, rank_stride, threads;  // rows of lora_B, S and dB are rank_stride apart: R, or all ranks of several adapters
  float scaling;
  bool add;  // dx holds dY W already; else it is yet to be added
  Dropout dropout;
};

// False: out of memory.
struct Kernels {
  bool (*forward)(const Call&);
  bool (*backward)(const Call&);
};
constexpr char KERNELS[] = "fastlora._cpu.kernels 3";  // the capsule's name, and the version of what this file says

}  // namespace fastlora
