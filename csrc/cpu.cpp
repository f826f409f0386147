// fastlora._cpu: the rank terms of the LoRA layer on a CPU, beside ATen's GEMM with the frozen weight.
//
// A Python extension in plain C++, with no libtorch: tensors come as addresses, sizes and strides, and are checked by
// fastlora/paths/cpu.py, or by node_cpu.h where that was built. The kernels are compiled for each instruction set, and the
// best that runs here is chosen when the module is loaded. They run on torch's own OpenMP threads, through the address of its GOMP_parallel: a second pool would fight the first.

#define PY_SSIZE_T_CLEAN
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // which has no limited API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#include <memory>
#include <new>
#include <type_traits>

#include "call.h"

namespace {

using fastlora::Call;
using fastlora::Dropout;
using fastlora::Dtype;
using fastlora::MAX_RANK;

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
template <typename T>
constexpr Dtype dtype_of() {
  return std::is_same<T, float>::value ? fastlora::FLOAT32
         : std::is_same<T, BFloat16>::value ? fastlora::BFLOAT16
                                            : fastlora::FLOAT16;
}

// function(T{}) for the type T of `dtype`
template <typename Function>
void with_dtype(Dtype dtype, const Function& function) {
  if (dtype == fastlora::FLOAT32) return function(float{});
  return dtype == fastlora::BFLOAT16 ? function(BFloat16{}) : function(Float16{});
}

typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);
ParallelRegion gomp_parallel = nullptr;

// body(part) for every part, each exactly once, on torch's team of threads: a team of another size would have libgomp end
// threads and start them again. Those for which there is no part leave.
template <typename Body>
void parallel(int parts, const Body& body) {
  if (parts == 1 || !gomp_parallel) {
    for (int part = 0; part < parts; ++part) body(part);
    return;
  }
  struct Shared {
    const Body& body;
    std::atomic<int> next;
    int parts;
  } shared{body, {0}, parts};
  gomp_parallel(
      [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        for (int part; (part = s.next.fetch_add(1)) < s.parts;) s.body(part);
      },
      &shared, 0, 0);
}

// One piece of the calling thread's memory for all that a call needs: first each part is reserved, then all allocated.
// It stays for the next call: its pages cost more than the arithmetic. `parts_of` keeps it below ARENA where it can.
constexpr std::int64_t ARENA = std::int64_t{64} << 20;
thread_local std::unique_ptr<char[]> memory;
thread_local std::int64_t capacity = 0;

class Arena {
 public:
  template <typename T>
  struct Part {
    std::int64_t start, each;  // bytes
  };
  // `count` elements for each of `parts`, which share no page: what another core writes beside them would cost
  template <typename T>
  Part<T> reserve(std::int64_t count, int parts = 1) {
    const Part<T> part{size_, (count * static_cast<std::int64_t>(sizeof(T)) + 4095) / 4096 * 4096};
    size_ += part.each * parts;
    return part;
  }
  void allocate() {
    if (capacity < size_ + 64) {
      memory.reset();
      capacity = 0;
      memory.reset(new char[size_ + 64]);
      capacity = size_ + 64;
    }
    start_ = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) % 64;
  }
  ~Arena() {
    if (capacity <= ARENA) return;
    memory.reset();
    capacity = 0;
  }
  template <typename T>
  T* operator()(const Part<T>& part, int index) const {
    return reinterpret_cast<T*>(start_ + part.start + index * part.each);
  }
  template <typename T>
  T* operator[](const Part<T>& part) const {
    return (*this)(part, 0);
  }

 private:
  std::int64_t size_ = 0;
  char* start_ = nullptr;
};

constexpr int BLOCK = 48;     // rows that are worked on together, at most; half of it too is whole tiles of rows
constexpr int DOT_RANKS = 4;  // ranks that `dot` computes together

// Half a block when the rows are so long that a whole one would take more than 3/8 of a usual core's own cache.
inline int block_rows(std::int64_t row_bytes) { return row_bytes * BLOCK <= (384 << 10) ? BLOCK : BLOCK / 2; }

// How many pieces the rows are cut into, each of which needs `bytes` of memory for itself.
inline int parts_of(const Call& call, std::int64_t bytes) {
  // below some 10 microseconds of work a second thread costs more than it does
  if (static_cast<double>(call.M) * (call.N + call.K) * call.R < 5e5) return 1;
  const std::int64_t memory = ARENA / std::max<std::int64_t>(1, bytes);
  return static_cast<int>(
      std::max<std::int64_t>(1, std::min({static_cast<std::int64_t>(call.threads), (call.M + 15) / 16, memory})));
}

inline std::int64_t ranks(int R) { return (R + DOT_RANKS - 1) / DOT_RANKS * DOT_RANKS; }

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Indices __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif

#if defined(__clang__)
#define FASTLORA_PRAGMA(text) _Pragma(#text)
#define FASTLORA_BEGIN_TARGET(isa) \
  FASTLORA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTLORA_END_TARGET _Pragma("clang attribute pop")
#else
#define FASTLORA_PRAGMA(text) _Pragma(#text)
#define FASTLORA_BEGIN_TARGET(isa) _Pragma("GCC push_options") FASTLORA_PRAGMA(GCC target(isa))
#define FASTLORA_END_TARGET _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__)
#define FROM_FLOAT16(h) _mm512_maskz_cvtph_ps(0xffff, bits_of<__m256i>(h))
#define TO_FLOAT16(v) _mm512_maskz_cvtps_ph(0xffff, bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT)
#if defined(__clang__) || __GNUC__ >= 10
#define FASTLORA_AVX512BF16
FASTLORA_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
namespace avx512bf16 {
#define NAMESPACE avx512bf16
constexpr int V = 16, DOT_ROWS = 6, EXPAND_ROWS = 8, OUTER_RANKS = 8;
#include "cpu_kernels.h"
#include "cpu_bfloat16.h"
typedef Kernels<BFloat16, BFloat16Engine> BothBFloat16;
#undef NAMESPACE
}  // namespace avx512bf16
FASTLORA_END_TARGET
#endif

FASTLORA_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define NAMESPACE avx512
constexpr int V = 16, DOT_ROWS = 6, EXPAND_ROWS = 8, OUTER_RANKS = 8;
#include "cpu_kernels.h"
typedef Kernels<BFloat16, FloatEngine> BothBFloat16;
#undef NAMESPACE
}  // namespace avx512
FASTLORA_END_TARGET

#undef FROM_FLOAT16
#undef TO_FLOAT16
#define FROM_FLOAT16(h) _mm256_cvtph_ps(bits_of<__m128i>(h))
#define TO_FLOAT16(v) _mm256_cvtps_ph(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT)
FASTLORA_BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#define NAMESPACE avx2
constexpr int V = 8, DOT_ROWS = 2, EXPAND_ROWS = 4, OUTER_RANKS = 4;
#include "cpu_kernels.h"
typedef Kernels<BFloat16, FloatEngine> BothBFloat16;
#undef NAMESPACE
}  // namespace avx2
FASTLORA_END_TARGET
#undef FROM_FLOAT16
#undef TO_FLOAT16
#endif

namespace portable {
#define NAMESPACE portable
constexpr int V = 4, DOT_ROWS = 2, EXPAND_ROWS = 4, OUTER_RANKS = 4;
#include "cpu_kernels.h"
typedef Kernels<BFloat16, FloatEngine> BothBFloat16;
#undef NAMESPACE
}  // namespace portable

struct Library {
  const char* name;
  // by the dtype of x; the last where x and the adapters are bfloat16
  void (*forwards[fastlora::DTYPES + 1])(const Call&);
  void (*backwards[fastlora::DTYPES + 1])(const Call&);
  void (*mask)(float*, const Call&);

  static int place(const Call& call) {
    const bool both = call.dtype == fastlora::BFLOAT16 && call.adapter_dtype == fastlora::BFLOAT16;
    return both ? fastlora::DTYPES : call.dtype;
  }
  void forward(const Call& call) const { forwards[place(call)](call); }
  void backward(const Call& call) const { backwards[place(call)](call); }
};

#define FASTLORA_EACH(isa, way)                                                               \
  {isa::Kernels<float, isa::FloatEngine>::way, isa::Kernels<BFloat16, isa::FloatEngine>::way, \
   isa::Kernels<Float16, isa::FloatEngine>::way, isa::BothBFloat16::way}
#define FASTLORA_LIBRARY(isa) {#isa, FASTLORA_EACH(isa, forward), FASTLORA_EACH(isa, backward), isa::mask}

const Library libraries[] = {
#if defined(__x86_64__)
#if defined(FASTLORA_AVX512BF16)
    FASTLORA_LIBRARY(avx512bf16),
#endif
    FASTLORA_LIBRARY(avx512),
    FASTLORA_LIBRARY(avx2),
#endif
    FASTLORA_LIBRARY(portable),
};
const Library* library = nullptr;

bool runs_here(const Library& candidate) {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;  // older compilers' __builtin_cpu_supports does not know f16c
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(FASTLORA_AVX512BF16)
  if (!std::strcmp(candidate.name, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (!std::strcmp(candidate.name, "avx512")) return avx512;
  if (!std::strcmp(candidate.name, "avx2")) return avx2;
#endif
  return !std::strcmp(candidate.name, "portable");
}

// The arguments in order; a wrong one leaves Python's error set and every later value 0.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected) : next_(values) {
    if (count != expected) PyErr_Format(PyExc_TypeError, "%zd arguments needed, got %zd", expected, count);
  }
  std::int64_t integer() { return PyErr_Occurred() ? 0 : PyLong_AsLongLong(*next_++); }
  int small() { return static_cast<int>(std::clamp<std::int64_t>(integer(), -1, 1 << 20)); }
  void dtypes(Call& call) {
    for (Dtype* dtype : {&call.dtype, &call.adapter_dtype}) {
      const std::int64_t code = integer();
      if (code < 0 || code >= fastlora::DTYPES) PyErr_SetString(PyExc_ValueError, "a dtype's code is out of range");
      *dtype = static_cast<Dtype>(code);
    }
  }
  double real() { return PyErr_Occurred() ? 0.0 : PyFloat_AsDouble(*next_++); }
  template <typename T = void>
  T* address() {
    return PyErr_Occurred() ? nullptr : static_cast<T*>(PyLong_AsVoidPtr(*next_++));
  }
  Dropout dropout() {
    const double p = real();
    const std::int64_t* seed = address<const std::int64_t>();
    return PyErr_Occurred() || p <= 0.0 || !seed ? Dropout::none() : Dropout::with(p, *seed);
  }
  // M, N, K, R, rank_stride, scaling, dropout_p, seed, threads: what ends a call of the layer
  void rest(Call& call) {
    call.M = integer();
    call.N = integer();
    call.K = integer();
    call.R = small();
    call.rank_stride = small();
    call.scaling = static_cast<float>(real());
    call.dropout = dropout();
    call.threads = small();
  }

 private:
  PyObject* const* next_;
};

template <typename Function>
bool allocates(const Function& function) {
  try {
    function();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

template <typename Function>
PyObject* run(const Call& call, bool addresses, const Function& function) {
  if (PyErr_Occurred()) return nullptr;
  if (!addresses && call.M && call.N && call.K) {  // a fake tensor, say, or one that is not on the CPU
    PyErr_SetString(PyExc_ValueError, "a tensor has no memory here");
    return nullptr;
  }
  if (call.R < 1 || call.R > MAX_RANK || call.rank_stride < call.R || call.threads < 0 ||
      std::min({call.M, call.N, call.K}) < 0) {
    PyErr_SetString(PyExc_ValueError, "a size is out of range");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS;
  enough = allocates(function);
  Py_END_ALLOW_THREADS;
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// forward(y, dtype, adapter_dtype, x, x_stride, A, B, S, M, N, K, R, rank_stride, scaling, p, seed, threads)
PyObject* forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments in(values, count, 17);
  Call call{};
  call.y = in.address();
  in.dtypes(call);
  call.x = in.address();
  call.x_stride = in.integer();
  call.lora_A = in.address();
  call.lora_B = in.address();
  call.S = in.address();
  in.rest(call);
  const bool addresses = call.x && call.lora_A && call.lora_B && call.S && call.y;
  return run(call, addresses, [&] { library->forward(call); });
}

// backward(dx, add, dtype, adapter_dtype, dy, dy_stride, x, x_stride, A, B, S, dA, dB, M, N, K, R, rank_stride,
//          scaling, p, seed, threads)
PyObject* backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments in(values, count, 22);
  Call call{};
  call.dx = in.address();
  call.add = in.integer();
  in.dtypes(call);
  call.dy = in.address();
  call.dy_stride = in.integer();
  call.x = in.address();
  call.x_stride = in.integer();
  call.lora_A = in.address();
  call.lora_B = in.address();
  call.S = in.address();
  call.dA = in.address();
  call.dB = in.address();
  in.rest(call);
  const bool addresses = call.dy && call.lora_A && call.lora_B && call.S && (call.x || !call.dA);
  return run(call, addresses, [&] { library->backward(call); });
}

// mask(out, M, K, p, seed): float32 (M, K), 1 / (1 - p) where x is kept and 0 where it is dropped
PyObject* mask(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments in(values, count, 5);
  Call call{};
  float* out = in.address<float>();
  call.M = in.integer();
  call.K = in.integer();
  call.dropout = in.dropout();
  call.N = call.R = call.rank_stride = 1;
  return run(call, out, [&] { library->mask(out, call); });
}

// for node.cpp
PyObject* kernels(PyObject*, PyObject*) {
  static fastlora::Kernels table{
      [](const Call& call) { return allocates([&] { library->forward(call); }); },
      [](const Call& call) { return allocates([&] { library->backward(call); }); }};
  return PyCapsule_New(&table, fastlora::KERNELS, nullptr);
}

PyObject* use_threads_of(PyObject*, PyObject* address) {
  void* function = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  gomp_parallel = reinterpret_cast<ParallelRegion>(function);
  Py_RETURN_NONE;
}

PyObject* use_instructions(PyObject*, PyObject* name) {
  if (!PyUnicode_Check(name)) {
    PyErr_SetString(PyExc_TypeError, "the name of an instruction set needs to be a str");
    return nullptr;
  }
  for (const Library& candidate : libraries)
    if (PyUnicode_CompareWithASCIIString(name, candidate.name) == 0 && runs_here(candidate)) {
      library = &candidate;
      Py_RETURN_NONE;
    }
  PyErr_Format(PyExc_ValueError, "this processor or build has no instruction set %R", name);
  return nullptr;
}

PyObject* instructions(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Library& candidate : libraries) {
    if (!names || !runs_here(candidate)) continue;
    PyObject* name = PyUnicode_FromString(candidate.name);
    if (!name || PyList_Append(names, name)) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

template <PyObject* (*FUNCTION)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(FUNCTION));
}

PyMethodDef methods[] = {
    {"forward", fastcall<forward>(), METH_FASTCALL, "S, and y += s S Bᵀ"},
    {"backward", fastcall<backward>(), METH_FASTCALL, "dA, dB, and dx (+)= drop'(dS A)"},
    {"mask", fastcall<mask>(), METH_FASTCALL, "the dropout mask of a seed"},
    {"kernels", kernels, METH_NOARGS, "forward and backward for C++, in a capsule"},
    {"use_threads_of", use_threads_of, METH_O, "run on the OpenMP pool whose GOMP_parallel has this address"},
    {"use_instructions", use_instructions, METH_O, "run the kernels compiled for this instruction set"},
    {"instructions", instructions, METH_NOARGS, "the instruction sets that can run here, fastest first"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fastlora._cpu", "The rank terms of the LoRA layer on a CPU.", -1, methods,
    nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  for (const Library& candidate : libraries)
    if (!library && runs_here(candidate)) library = &candidate;
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddIntConstant(made, "MAX_RANK", MAX_RANK)) Py_CLEAR(made);
  return made;
}
