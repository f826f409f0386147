// Dropout's seeds on a GPU without a launch for each: the very numbers that torch.randint would draw there, call after
// call, computed here by the block and copied over. Which are next say the seed and the offset of torch's own generator,
// which move on as if it had drawn: whatever sets, saves or restores its state means the same as ever.
//
// Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox4x32-10), with cuRAND's layout of the
// counter. fastlora.node compares them with torch's own on each device before it trusts them.

#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/empty.h>

#include <array>
#include <limits>
#include <mutex>

#include "layer.h"
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

// A tensor of one element of `all`, made without the dispatcher.
inline Tensor element(const Tensor& all, int64_t place) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(all.storage()),
                                                         all.key_set(), all.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(), at::IntArrayRef(), place);
  return made;
}

class Seeds {
  static constexpr std::uint64_t DRAWS = 256, STEP = 4;  // draws of a block; what each moves the offset by
  static constexpr int MOST = 4, APART = 2;              // seeds of a draw, 16 bytes from one to the next

  struct Block {
    Tensor values;  // (DRAWS, MOST, APART)
    std::uint64_t seed, number;
    void* stream;
  };
  std::mutex mutex_;
  std::array<Block, 64> blocks_{};  // by device
  std::array<bool, 64> trusted_{};

 public:
  void trust(int device) {
    if (device >= 0 && device < 64) trusted_[device] = true;
  }

  // As many seeds as one launch would draw, at most MOST, for kernels on `stream`; false: draw them by a launch, as in a
  // graph, whose replays are to draw anew.
  bool draw(c10::Device device, void* stream, int count, Tensor* found) {
    if (!device.is_cuda() || device.index() >= 64 || !trusted_[device.index()] || count > MOST) return false;
    int capturing = 0;
    if (driver()->cuStreamIsCapturing(stream, &capturing) || capturing) return false;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::uint64_t seed, offset;
    {
      const std::lock_guard<std::mutex> guard(generator.mutex());
      seed = generator.current_seed(), offset = generator.get_offset();
      generator.set_offset(offset + STEP);
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    Block& block = blocks_[device.index()];
    const std::uint64_t draw = offset / STEP, number = draw / DRAWS;
    if (!block.values.defined() || block.seed != seed || block.number != number || block.stream != stream)
      block = {computed(seed, number).to(device, at::kLong, /*non_blocking=*/true), seed, number, stream};
    for (int i = 0; i < count; ++i)
      found[i] = element(block.values, static_cast<int64_t>((draw % DRAWS * MOST + i) * APART));
    return true;
  }

 private:
  static Tensor computed(std::uint64_t seed, std::uint64_t number) {
    const auto options = at::TensorOptions(at::kLong).pinned_memory(true);  // so that no host waits for the copy
    Tensor made = at::empty({static_cast<int64_t>(DRAWS), MOST, APART}, options);
    int64_t* value = made.mutable_data_ptr<int64_t>();
    for (std::uint64_t draw = number * DRAWS; draw < (number + 1) * DRAWS; ++draw)
      for (std::uint64_t thread = 0; thread < MOST * APART; ++thread)
        *value++ = randint_on_gpu(seed, draw * STEP, thread);
    return made;
  }
};

inline Seeds& seeds = *new Seeds;  // never freed: at a process's end there may be no driver to free memory by

}  // namespace fastlora
