// What the node knows: which path was chosen for which calls, and what their paths do in them.
//
//   chosen    (device, dtypes, layouts, rank, dropout)       -> path       told by fastlora.choice
//   records   (path, direction, all that a launch may hold)  -> record     told by fastlora.node; null: there is none
//
// Path `cpu` needs no record: its kernels are compiled for every call. On a CPU only the rank matters to the choice.

#pragma once

#include <ATen/Context.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "layer.h"
#include "record.h"

namespace fastlora {

class Key {
  static constexpr int CAPACITY = 288;  // of a call of several projections
  int64_t count_ = 0, values_[CAPACITY];

 public:
  bool overflows = false;  // more dimensions than anyone has: such a call is left to Python

  void add(int64_t value) {
    if (count_ == CAPACITY)
      overflows = true;
    else
      values_[count_++] = value;
  }
  void add(double value) {
    int64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    add(bits);
  }
  // Sizes, strides, and the place within 16 bytes: all of it that a launch can depend on, but the address.
  void add(const Tensor& t) {
    if (!t.defined()) return add(int64_t{-1});
    const auto place = reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) & 15;
    add(t.dim() << 16 | static_cast<int64_t>(t.scalar_type()) << 8 | static_cast<int64_t>(place));
    for (const int64_t size : t.sizes()) add(size);
    for (const int64_t stride : t.strides()) add(stride);
  }
  void add(const Key& other) {
    for (int64_t i = 0; i < other.count_; ++i) add(other.values_[i]);
    overflows = overflows || other.overflows;
  }
  bool operator==(const Key& other) const {
    return count_ == other.count_ && !std::memcmp(values_, other.values_, count_ * sizeof *values_);
  }
  std::size_t hash() const {
    std::uint64_t sum = 0xcbf29ce484222325;
    for (int64_t i = 0; i < count_; ++i)
      sum = ((sum ^ static_cast<std::uint64_t>(values_[i])) * 0x9E3779B97F4A7C15) ^ (sum >> 29);
    return sum;
  }
};
struct Hash {
  std::size_t operator()(const Key& key) const { return key.hash(); }
};

// torch's settings on which a choice or a launch may depend
inline int64_t settings() {
  const at::Context& context = at::globalContext();
  int64_t precision;
  try {
    precision = static_cast<int64_t>(context.float32MatmulPrecision());
  } catch (const c10::Error&) {  // set by the newer names, which the older ones cannot say
    precision = 255;
  }
  return context.deterministicAlgorithms() << 8 | precision;
}

inline Key choice_key(const Tensor& x, const Tensor& weight, const Tensor& lora_A, bool dropout) {
  Key key;
  key.add(static_cast<int64_t>(x.device().is_cpu() ? -1 : x.device().index()) << 16 |
          static_cast<int64_t>(x.scalar_type()) << 8 | static_cast<int64_t>(lora_A.scalar_type()));
  key.add(lora_A.size(0) << 1 | dropout);
  if (x.device().is_cpu()) return key;
  key.add(settings());
  key.add(x);
  key.add(weight);
  return key;
}

// Of several also what is asked for: their backward has kernels of its own for it, which are admitted by themselves.
inline Key choice_key(const Layers& each) {
  const auto of = [](const Layer& one) { return choice_key(one.x, one.weight, one.lora_A, one.p > 0.0); };
  if (each.size() == 1) return of(each[0]);
  Key key;
  key.add(int64_t{each[0].x.requires_grad()});
  for (const Layer& one : each) {
    key.add(of(one));
    key.add(int64_t{one.lora_A.requires_grad()} << 1 | one.lora_B.requires_grad());
  }
  return key;
}

inline Key record_key(int path, const Layers& each) {
  const Tensor& x = each[0].x;
  Key key;
  key.add(int64_t{path} << 32 | (x.device().index() + 1) << 1);
  key.add(settings());
  key.add(each[0].p);
  key.add(x);
  for (const Layer& one : each) {
    for (const Tensor* t : {&one.weight, &one.lora_A, &one.lora_B, &one.bias}) key.add(*t);
    key.add(one.scaling);
  }
  return key;
}

inline Key record_key(int path, const Incomings& each) {
  Key key;
  key.add(int64_t{path} << 32 | (each[0].dy.device().index() + 1) << 1 | 1);
  key.add(settings());
  key.add(each[0].p);
  for (const Incoming& in : each) {
    for (const Tensor* t : {&in.dy, &in.x, &in.weight, &in.lora_A, &in.lora_B, &in.S}) key.add(*t);
    key.add(in.scaling);
    key.add(int64_t{in.need_B});
  }
  return key;
}

// A bounded map for many threads.
template <typename Value>
class Table {
  std::mutex mutex_;
  std::unordered_map<Key, Value, Hash> values_;

 public:
  std::optional<Value> find(const Key& key) {
    if (key.overflows) return std::nullopt;
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = values_.find(key);
    return found == values_.end() ? std::nullopt : std::optional<Value>(found->second);
  }
  void insert(const Key& key, Value value) {
    if (key.overflows) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    if (values_.size() >= 4096) values_.clear();  // a server with every length under the sun
    values_.insert_or_assign(key, std::move(value));
  }
  void clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    values_.clear();
  }
};

inline Table<int> chosen;
inline Table<std::shared_ptr<const Record>> records;

// What was met once, by hashes alone: on a CPU a call is recorded when it comes again, for one of a length that never
// does would be watched for nothing, at three times its cost. On a GPU the first call compiles.
class Met {
  std::mutex mutex_;
  std::unordered_set<std::size_t> hashes_;

 public:
  bool again(const Key& key) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (hashes_.size() >= 65536) hashes_.clear();
    return !hashes_.insert(key.hash()).second;
  }
  void clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    hashes_.clear();
  }
};
inline Met met;

// Whether a call is to be recorded.
inline bool lacks(const std::optional<Key>& key, bool cuda) {
  return key && !key->overflows && !records.find(*key) && (cuda || met.again(*key));
}

}  // namespace fastlora
