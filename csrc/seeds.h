// Dropout's seeds on a GPU without a launch for each: the very numbers that torch.randint would draw there, computed here
// from the seed and offset of torch's own generator, which moves on as if it had drawn, and written in the stream's order.
//
// Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox4x32-10), with cuRAND's layout of the
// counter. fastlora.node compares them with torch's own on each device before it trusts them.

#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <utility>

#include "record.h"

namespace fastlora {

// The number that the `thread`th thread of a launch of torch.randint(2**63 - 1, ...) draws first.
inline int64_t randint_on_gpu(std::uint64_t seed, std::uint64_t offset, std::uint64_t thread) {
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  const std::uint64_t counter = offset / 4;
  std::uint32_t c[4] = {static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
                        static_cast<std::uint32_t>(thread), static_cast<std::uint32_t>(thread >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0], b = std::uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], c[1] = static_cast<std::uint32_t>(b);
    c[2] = static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], c[3] = static_cast<std::uint32_t>(a);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  const std::uint64_t bits = std::uint64_t{c[0]} << 32 | c[1];
  return static_cast<int64_t>(bits % std::uint64_t{std::numeric_limits<int64_t>::max()});
}

// at::CUDAGeneratorImpl::philox_engine_inputs, by its name, since no header of CUDA's is needed here: a generator's seed
// and offset, which it moves on. Null where torch has none.
typedef std::pair<std::uint64_t, std::uint64_t> (*Advance)(c10::GeneratorImpl*, std::uint64_t);
inline Advance advance() {
  static const Advance found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    const char* name = "_ZN2at17CUDAGeneratorImpl20philox_engine_inputsEm";
    return library ? reinterpret_cast<Advance>(dlsym(library, name)) : nullptr;
  }();
  return found;
}

// Writes what torch.randint would to `made`, int64, for kernels on `stream`: all of a (), the first column of an (n, 2).
// False where it cannot: with no such driver, or in a graph, whose replays are to draw anew.
inline bool write_seeds(at::Generator generator, void* stream, const Tensor& made) {
  const Driver* driver = fastlora::driver();
  if (!driver || !driver->cuStreamWriteValue64 || !advance() || !generator.device().is_cuda()) return false;
  int capturing = 0;
  if (driver->cuStreamIsCapturing(stream, &capturing) || capturing) return false;
  std::pair<std::uint64_t, std::uint64_t> state;
  {
    const std::lock_guard<std::mutex> guard(generator.mutex());
    state = advance()(generator.unsafeGetGeneratorImpl(), 4);
  }
  int64_t* place = made.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < made.numel(); i += 2)
    driver->check(driver->cuStreamWriteValue64(stream, place + i, randint_on_gpu(state.first, state.second, i), 0),
                  "a seed was not written");
  return true;
}

inline std::array<std::atomic<bool>, 64> seeds_agree{};  // by device: they were compared there

// The same by the device's default generator, where it may be trusted.
inline bool write_seeds(void* stream, const Tensor& made) {
  const c10::Device device = made.device();
  return device.is_cuda() && device.index() < 64 && seeds_agree[device.index()] &&
         write_seeds(at::globalContext().defaultGenerator(device), stream, made);
}

}  // namespace fastlora
