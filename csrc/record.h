// What a path did in one call, as data: launches of compiled kernels and products of ATen's, done again with
// other tensors of the same sizes, strides and alignment. fastlora/record.py makes a record by watching the path once.
//
// No header of CUDA is needed: libcuda is opened when the first record comes, and the few structs of its interface that
// are used stand here.

#pragma once

#include <torch/csrc/python_headers.h>

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace fastlora {

using at::Tensor;
using std::int64_t;

// ---- the driver ----

struct LaunchAttribute {  // CUlaunchAttribute
  std::uint32_t id, padding;
  char value[64];
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};

struct Driver {
  int (*cuLaunchKernelEx)(const LaunchConfig*, void* function, void** parameters, void** extra);
  int (*cuTensorMapEncodeTiled)(void* map, int type, std::uint32_t rank, void* address, const std::uint64_t* sizes,
                                const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* steps,
                                int interleave, int swizzle, int promotion, int fill);
  int (*cuStreamIsCapturing)(void* stream, int* status);
  int (*cuCtxGetCurrent)(void** context);
  int (*cuCtxSetCurrent)(void* context);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
  int (*cuGetErrorString)(int error, const char** text);
  int (*cuDriverGetVersion)(int* version);
  int (*cuStreamWriteValue64)(void* stream, void* address, std::uint64_t value, unsigned flags);  // null in an old one
  int version;

  void check(int error, const char* what) const {
    const char* text = nullptr;
    if (error) cuGetErrorString(error, &text);
    TORCH_CHECK(!error, "fastlora: ", what, ": ", text ? text : "unknown error", " (CUDA driver error ", error, ")");
  }
};

// The driver, or null where there is none. Opened once; `library` is for tests.
inline const Driver* driver(const char* library = nullptr) {
  static Driver found{};
  static bool ready = false;
  static std::string opened;
  const std::string name = library ? library : opened.empty() ? "libcuda.so.1" : opened;
  if (name == opened) return ready ? &found : nullptr;
  opened = name;
  void* handle = dlopen(name.c_str(), RTLD_NOW);
  const auto find = [&](auto& function, const char* symbol) {
    function = handle ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, symbol)) : nullptr;
    ready = ready && function;
  };
  find(found.cuStreamWriteValue64, "cuStreamWriteValue64_v2");
  ready = handle != nullptr;
  find(found.cuLaunchKernelEx, "cuLaunchKernelEx");
  find(found.cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
  find(found.cuStreamIsCapturing, "cuStreamIsCapturing");
  find(found.cuCtxGetCurrent, "cuCtxGetCurrent");
  find(found.cuCtxSetCurrent, "cuCtxSetCurrent");
  find(found.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(found.cuGetErrorString, "cuGetErrorString");
  find(found.cuDriverGetVersion, "cuDriverGetVersion");
  if (ready) found.cuDriverGetVersion(&found.version);
  return ready ? &found : nullptr;
}

// The current stream of the current device, as the driver knows it.
struct Stream {
  bool known;
  void* handle;
};
template <typename Guard>
Stream stream_of(const Guard& guard, c10::Device device) {
  const c10::Stream stream = guard.getStream(device);
  if constexpr (requires { guard.getStreamNativeHandle(stream); })
    return {true, guard.getStreamNativeHandle(stream)};
  return {stream.id() == 0, nullptr};  // an older torch tells of no other stream
}
inline Stream current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getDevice() == device ? stream_of(guard, device) : Stream{false, nullptr};
}

// ---- a record ----

// Numbers as fastlora/record.py packs them, all int64. A slot is an input, then an output, then the workspace.
struct Output {
  int64_t like, dims, sizes[5], strides[5];  // of the dtype of input `like`
};
struct Pointer {
  int64_t place, slot, offset;  // parameters + place: the address of the slot + offset bytes
};
struct TensorMap {
  Pointer base;
  int64_t type, rank, swizzle, fill, small, sizes[5], strides[5], box[5];  // innermost dimension first; bytes
};
struct Matrix {
  int64_t slot, offset, dims, sizes[2], strides[2];  // offset in bytes; no dims: there is none
};
inline bool same(const Matrix& one, const Matrix& other) { return !std::memcmp(&one, &other, sizeof one); }
struct Product {
  Matrix out, c, a, b;  // out = beta c + alpha a b; c may be out. Without b: a, cast
  int64_t like;         // an input of their dtype
  double beta, alpha;
};

class Record {
  struct Launch {
    void* function;
    unsigned grid[3], block, shared;
    std::vector<LaunchAttribute> attributes;
    std::string parameters;  // one beside the other, with gaps where addresses and tensor maps go
    std::vector<int64_t> places;
    std::vector<Pointer> pointers;
    std::vector<TensorMap> maps;
  };
  struct Step {
    Launch launch;
    std::unique_ptr<Product> product;  // where this is no launch
  };

  // That of at::empty, which is not always c10's for the device. Without the dispatcher, which costs more than it.
  c10::Allocator* allocator_ = nullptr;
  std::vector<Output> outputs_;
  int64_t workspace_ = 0;
  std::vector<Step> steps_;

  template <typename Item>
  static std::vector<Item> unpacked(const char* bytes, Py_ssize_t size) {
    std::vector<Item> items(size / sizeof(Item));
    std::memcpy(items.data(), bytes, items.size() * sizeof(Item));
    return items;
  }

 public:
  static constexpr int SLOTS = 40, PARAMETERS = 64, BYTES = 4096;

  // (outputs, workspace, steps), for tensors like `like`; null with an error of Python's set where it is none. A step
  // is the bytes of a Product, or (function, grid, threads, shared, attributes, parameters, places, pointers, maps).
  static std::shared_ptr<const Record> parse(PyObject* object, const Tensor& like) {
    const auto record = std::make_shared<Record>();
    record->allocator_ = at::empty({1}, like.options()).storage().allocator();
    const char* outputs;
    Py_ssize_t size;
    long long workspace;
    PyObject* steps;
    if (!PyArg_ParseTuple(object, "y#LO!", &outputs, &size, &workspace, &PyTuple_Type, &steps)) return nullptr;
    record->outputs_ = unpacked<Output>(outputs, size);
    record->workspace_ = workspace;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); ++i) {
      PyObject* item = PyTuple_GET_ITEM(steps, i);
      Step& step = record->steps_.emplace_back();
      if (PyBytes_Check(item)) {
        step.product = std::make_unique<Product>();
        std::memcpy(step.product.get(), PyBytes_AS_STRING(item), sizeof(Product));
        continue;
      }
      Launch& launch = step.launch;
      unsigned long long function;
      const char *attributes, *parameters, *places, *pointers, *maps;
      Py_ssize_t n_attributes, n_parameters, n_places, n_pointers, n_maps;
      if (!PyArg_ParseTuple(item, "K(III)IIy#y#y#y#y#", &function, &launch.grid[0], &launch.grid[1], &launch.grid[2],
                            &launch.block, &launch.shared, &attributes, &n_attributes, &parameters, &n_parameters,
                            &places, &n_places, &pointers, &n_pointers, &maps, &n_maps))
        return nullptr;
      launch.function = reinterpret_cast<void*>(function);
      launch.attributes = unpacked<LaunchAttribute>(attributes, n_attributes);
      launch.parameters.assign(parameters, n_parameters);
      launch.places = unpacked<int64_t>(places, n_places);
      launch.pointers = unpacked<Pointer>(pointers, n_pointers);
      launch.maps = unpacked<TensorMap>(maps, n_maps);
      if (n_parameters > BYTES || launch.places.size() > PARAMETERS) {
        PyErr_SetString(PyExc_ValueError, "a kernel with more parameters than a record holds");
        return nullptr;
      }
    }
    return record;
  }

  std::size_t outputs() const { return outputs_.size(); }

  // at::empty on the record's device
  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device) const {
    return at::detail::empty_generic(sizes, allocator_, keys_of(device), dtype, std::nullopt);
  }

  // Makes the outputs anew. The `given` inputs may be undefined; `stream` is the current one of their device.
  void run(const Tensor* const* inputs, std::size_t given, Tensor* outputs, void* stream) const {
    const Tensor* slots[SLOTS];
    char* addresses[SLOTS];
    std::copy(inputs, inputs + given, slots);
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      const Output& output = outputs_[i];
      const Tensor& like = *inputs[output.like];
      outputs[i] = at::detail::empty_strided_generic(at::IntArrayRef(output.sizes, output.dims),
                                                     at::IntArrayRef(output.strides, output.dims), allocator_,
                                                     keys_of(like.device()), like.scalar_type());
      slots[given + i] = &outputs[i];
    }
    const std::size_t count = given + outputs_.size();
    for (std::size_t i = 0; i < count; ++i) {
      const Tensor& t = *slots[i];
      const void* address = !t.defined() ? nullptr : i < given ? t.const_data_ptr() : t.data_ptr();
      addresses[i] = static_cast<char*>(const_cast<void*>(address));
    }
    c10::Storage workspace;
    if (workspace_)
      workspace = c10::Storage(c10::Storage::use_byte_size_t(), workspace_, allocator_->allocate(workspace_), allocator_,
                               /*resizable=*/false);
    addresses[count] = workspace ? static_cast<char*>(workspace.mutable_data()) : nullptr;
    for (const Step& step : steps_) {
      if (!step.product) {
        start(*fastlora::driver(), step.launch, addresses, stream);
        continue;
      }
      const Product& product = *step.product;
      const auto matrix = [&](const Matrix& m) {
        const bool scratch = static_cast<std::size_t>(m.slot) == count;
        const Tensor& t = *slots[scratch ? product.like : m.slot];
        return view(m, t, scratch ? workspace : t.storage(), scratch ? 0 : t.storage_offset());
      };
      Tensor out = matrix(product.out);
      if (!product.b.dims)
        out.copy_(matrix(product.a));
      else if (product.c.dims)  // onto what is there: another tensor of it would be copied onto itself
        at::addmm_out(out, same(product.c, product.out) ? out : matrix(product.c), matrix(product.a),
                      matrix(product.b), product.beta, product.alpha);
      else if (product.alpha == 1.0)
        at::mm_out(out, matrix(product.a), matrix(product.b));
      else
        at::addmm_out(out, out, matrix(product.a), matrix(product.b), 0.0, product.alpha);
    }
  }

 private:
  static c10::DispatchKeySet keys_of(c10::Device device) {
    return c10::DispatchKeySet(device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  }

  // Without a way through the dispatcher, which would cost more than the launch.
  static Tensor view(const Matrix& m, const Tensor& like, const c10::Storage& storage, int64_t offset) {
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage),
                                                           like.key_set(), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(
        at::IntArrayRef(m.sizes, m.dims), at::IntArrayRef(m.strides, m.dims),
        offset + m.offset / static_cast<int64_t>(like.dtype().itemsize()));
    return made;
  }

  static void start(const Driver& driver, const Launch& launch, char* const* addresses, void* stream) {
    alignas(64) char values[BYTES];
    void* parameters[PARAMETERS];
    std::memcpy(values, launch.parameters.data(), launch.parameters.size());
    for (std::size_t i = 0; i < launch.places.size(); ++i) parameters[i] = values + launch.places[i];
    for (const Pointer& pointer : launch.pointers) {
      const char* address = addresses[pointer.slot] + pointer.offset;
      std::memcpy(values + pointer.place, &address, sizeof address);
    }
    for (const TensorMap& map : launch.maps) encode(driver, map, values + map.base.place, addresses);
    LaunchAttribute attributes[4];
    std::copy(launch.attributes.begin(), launch.attributes.end(), attributes);
    const LaunchConfig config{{launch.grid[0], launch.grid[1], launch.grid[2]}, {launch.block, 1, 1}, launch.shared,
                              stream, attributes, static_cast<unsigned>(launch.attributes.size())};
    driver.check(driver.cuLaunchKernelEx(&config, launch.function, parameters, nullptr), "a kernel was not launched");
  }

  static void encode(const Driver& driver, const TensorMap& map, void* place, char* const* addresses) {
    std::uint64_t sizes[5], strides[5];
    std::uint32_t box[5];
    const std::uint32_t steps[5] = {1, 1, 1, 1, 1};
    std::copy(map.sizes, map.sizes + 5, sizes);
    std::copy(map.strides, map.strides + 5, strides);
    std::copy(map.box, map.box + 5, box);
    constexpr int no_interleave = 0, promote_128 = 2;
    driver.check(driver.cuTensorMapEncodeTiled(place, static_cast<int>(map.type), static_cast<std::uint32_t>(map.rank),
                                               addresses[map.base.slot] + map.base.offset, sizes, strides, box, steps,
                                               no_interleave, static_cast<int>(map.swizzle), promote_128,
                                               static_cast<int>(map.fill)),
                 "a tensor map was not made");
    if (map.small && driver.version <= 13010) static_cast<std::uint64_t*>(place)[1] &= ~(1ull << 21);  // as Triton does
  }
};

// Threads of torch's backward and of the user's may have no context of CUDA's yet, and a launch makes none.
inline void ensure_context(c10::Device device) {
  void* context = nullptr;
  const Driver& driver = *fastlora::driver();
  driver.cuCtxGetCurrent(&context);
  if (context) return;
  driver.check(driver.cuDevicePrimaryCtxRetain(&context, device.index()), "no context");
  driver.check(driver.cuCtxSetCurrent(context), "no context");
}

}  // namespace fastlora
