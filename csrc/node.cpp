// fastlora._node_<torch's version>: path `cpu` as an autograd node of torch's own, for ordinary tensors.
//
// It does what fastlora/functional.py, autograd.py and paths/cpu.py do, with the same kernels, seeds and ATen calls, and
// saves most of the time that a small layer spends in Python. Whatever is out of the ordinary (a subclass, a function
// transform, a wrong shape, a gradient of another kind) it leaves to Python, which explains and serves it: no message is
// written here. It is bound to one version of torch, which its name says, and optional: without it Python does it all.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "call.h"

namespace {

using at::Tensor;
using std::int64_t;
using torch::autograd::variable_list;
typedef std::optional<Tensor> Optional;

// Given once by `prepare`, and kept for good.
const fastlora::Kernels* kernels = nullptr;
PyObject* path_cpu = nullptr;          // fastlora.paths.PATHS["cpu"]
PyObject* python_gradients = nullptr;  // fastlora.autograd.gradients

// What fastlora.choice has found: whether path `cpu` runs for the dtypes of x and of the adapters (bfloat16 or float32),
// the rank, and dropout on or off. Read and written under the GIL.
bool allowed[2][2][fastlora::MAX_RANK + 1][2];

bool is_bfloat16(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }
bool kernels_take(const Tensor& t) { return is_bfloat16(t) || t.scalar_type() == at::kFloat; }

// Dense, on the CPU, with memory of its own, not conjugated or negated, and nobody's wrapper: no other key is set.
bool is_plain(const Tensor& t) {
  const c10::DispatchKeySet usual({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                   c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  // a difference keeps the bit that says whose memory it is
  return t.key_set() - usual == c10::DispatchKeySet(c10::BackendComponent::CPUBit) && t.has_storage();
}

bool nobody_watches() {
  return !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// (..., K) as (M, K) with the elements of a row side by side.
Tensor dense_rows(const Tensor& t) {
  Tensor two = t.dim() == 2 ? t : t.dim() > 2 ? t.flatten(0, -2) : t.unsqueeze(0);
  return two.stride(1) == 1 ? two : two.contiguous();
}

fastlora::Dropout dropout(double p, const Tensor& seed) {
  return seed.defined() ? fastlora::Dropout::with(p, *seed.const_data_ptr<int64_t>()) : fastlora::Dropout::none();
}

struct Result {
  Tensor y, S, seed;
};

Result forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Optional& bias,
               double scaling, double p) {
  Tensor seed;
  if (p > 0.0)  // fastlora.paths.problem.draw_seed
    seed = at::randint(std::numeric_limits<int64_t>::max(), {}, at::TensorOptions(at::kLong).device(at::kCPU));
  const Tensor rows = dense_rows(x), A = lora_A.contiguous(), B = lora_B.contiguous();
  fastlora::Call call{};
  call.M = rows.size(0);
  call.K = rows.size(1);
  call.N = B.size(0);
  call.R = static_cast<int>(B.size(1));
  const Tensor S = at::empty({call.M, call.R}, x.options());
  Tensor y;
  if (x.dim() == 2) {
    y = at::linear(x, weight, bias);
  } else {  // at::linear would return a view here, on which autograd forbids in-place operations
    auto shape = x.sizes().vec();
    shape.back() = call.N;
    y = at::empty(shape, x.options());
    Tensor two = y.view({call.M, call.N});
    if (bias)
      at::addmm_out(two, *bias, rows, weight.t());
    else
      at::mm_out(two, rows, weight.t());
  }
  call.y = y.data_ptr();
  call.x = rows.const_data_ptr();
  call.x_stride = rows.stride(0);
  call.lora_A = A.const_data_ptr();
  call.lora_B = B.const_data_ptr();
  call.S = S.data_ptr();
  call.scaling = static_cast<float>(scaling);
  call.threads = at::get_num_threads();
  call.dropout = dropout(p, seed);
  TORCH_CHECK(kernels->forward(is_bfloat16(x), is_bfloat16(A), call), "fastlora: out of memory");
  return {y, S, seed};
}

// What is asked for of dx, dA, dB and dbias; undefined where it is not.
struct Needs {
  bool x, A, B, bias;
};

variable_list backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                       const Tensor& lora_B, const Tensor& S_, const Tensor& seed, double scaling, double p,
                       const Needs& needs) {
  const Tensor rows = dense_rows(dy), A = lora_A.contiguous(), B = lora_B.contiguous(), S = S_.contiguous();
  Tensor x_rows, dx, dA, dB, dbias;
  fastlora::Call call{};
  call.M = rows.size(0);
  call.N = rows.size(1);
  call.K = A.size(1);
  call.R = static_cast<int>(A.size(0));
  if (needs.A) {
    x_rows = dense_rows(x);
    dA = at::empty_like(A);
    call.x = x_rows.const_data_ptr();
    call.x_stride = x_rows.stride(0);
    call.dA = dA.data_ptr();
  }
  if (needs.B) {
    dB = at::empty_like(B);
    call.dB = dB.data_ptr();
  }
  call.add = is_bfloat16(rows);  // as in fastlora/paths/cpu.py
  if (needs.x) {
    dx = call.add ? at::mm(rows, weight) : at::empty({call.M, call.K}, rows.options());
    call.dx = dx.data_ptr();
  }
  call.dy = rows.const_data_ptr();
  call.dy_stride = rows.stride(0);
  call.lora_A = A.const_data_ptr();
  call.lora_B = B.const_data_ptr();
  call.S = const_cast<void*>(S.const_data_ptr());
  call.scaling = static_cast<float>(scaling);
  call.threads = at::get_num_threads();
  call.dropout = dropout(p, seed);
  TORCH_CHECK(kernels->backward(is_bfloat16(rows), is_bfloat16(A), call), "fastlora: out of memory");
  if (needs.x && !call.add) dx.addmm_(rows, weight);
  if (needs.bias) dbias = rows.sum(0);
  if (needs.x && dy.dim() != 2) {
    auto shape = dy.sizes().vec();
    shape.back() = call.K;
    dx = dx.view(shape);
  }
  return {dx, dA, dB, dbias};
}

struct HoldsGIL {
  PyGILState_STATE state = PyGILState_Ensure();
  ~HoldsGIL() { PyGILState_Release(state); }
};
struct ReleasesGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~ReleasesGIL() { PyEval_RestoreThread(state); }
};

struct Decrease {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
typedef std::unique_ptr<PyObject, Decrease> Owned;

PyObject* borrowed(const Tensor& t, Owned& holder) {
  holder.reset(t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None));
  return holder.get();
}

variable_list backward_in_python(const Tensor& dy, const variable_list& saved, double scaling, double p,
                                 const Needs& needs) {
  HoldsGIL gil;
  Owned held[7];
  PyObject* tensors[7] = {borrowed(dy, held[0])};
  for (int i = 0; i < 6; ++i) tensors[i + 1] = borrowed(saved[i], held[i + 1]);
  const Owned found(PyObject_CallFunction(python_gradients, "OOOOOOOddO(iiii)", tensors[0], tensors[1], tensors[2],
                                          tensors[3], tensors[4], tensors[5], tensors[6], scaling, p, path_cpu,
                                          needs.x, needs.A, needs.B, needs.bias));
  if (!found) throw python_error();
  variable_list gradients(4);
  for (int i = 0; i < 4; ++i) {
    PyObject* one = PyTuple_GetItem(found.get(), i);
    if (one && one != Py_None) gradients[i] = THPVariable_Unpack(one);
  }
  return gradients;
}

// Zeros of x's shape in no memory, with x's history: see fastlora.autograd._shadow.
Tensor shadow(const Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView no_views;
  const Tensor zeros = at::zeros({}, x.options()).expand(x.sizes());
  torch::autograd::impl::set_gradient_edge(zeros, torch::autograd::impl::gradient_edge(x));
  return zeros;
}

struct LoRALinear : torch::autograd::Function<LoRALinear> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& lora_A, const Tensor& lora_B, const Optional& bias, double scaling, double p) {
    const Result result = ::forward(x, weight, lora_A, lora_B, bias, scaling, p);
    const Tensor kept = lora_A.requires_grad()                        ? x
                        : x.requires_grad() && lora_B.requires_grad() ? shadow(x)
                                                                      : Tensor();
    ctx->save_for_backward({kept, x.requires_grad() ? weight : Tensor(), lora_A, lora_B,
                            result.S, result.seed});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["p"] = p;
    ctx->saved_data["bias"] = bias.has_value();
    return result.y;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& incoming) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor& dy = incoming[0];
    const variable_list saved = ctx->get_saved_variables();
    const double scaling = ctx->saved_data["scaling"].toDouble(), p = ctx->saved_data["p"].toDouble();
    const Needs needs{ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                      ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(4)};
    const Tensor x = needs.A ? saved[0] : Tensor();
    const Tensor &weight = saved[1], &A = saved[2], &B = saved[3], &S = saved[4], &seed = saved[5];
    const bool ours = !at::GradMode::is_enabled() && nobody_watches() && is_plain(dy) &&
                      as_expected(dy, x, weight, A, B, S, seed);
    const variable_list g = ours ? ::backward(dy, x, weight, A, B, S, seed, scaling, p, needs)
                                 : backward_in_python(dy, saved, scaling, p, needs);
    return {g[0], Tensor(), g[1], g[2], g[3], Tensor(), Tensor()};
  }

 private:
  // Hooks of saved tensors may have changed them, and the kernels read addresses.
  static bool as_expected(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                          const Tensor& S, const Tensor& seed) {
    const auto dtype = dy.scalar_type();
    if (!is_plain(A) || !is_plain(B) || !is_plain(S) || A.dim() != 2 || B.dim() != 2 || S.dim() != 2) return false;
    const int64_t N = dy.size(-1), M = N ? dy.numel() / N : S.size(0), R = A.size(0), K = A.size(1);
    if (!kernels_take(dy) || !kernels_take(A) || B.scalar_type() != A.scalar_type() || R > fastlora::MAX_RANK)
      return false;
    if (S.scalar_type() != dtype || S.size(0) != M || S.size(1) != R || B.size(0) != N || B.size(1) != R) return false;
    if (seed.defined() && (!is_plain(seed) || seed.scalar_type() != at::kLong || seed.numel() != 1)) return false;
    if (weight.defined() && (!is_plain(weight) || weight.scalar_type() != dtype || weight.dim() != 2 ||
                             weight.size(0) != N || weight.size(1) != K))
      return false;
    return !x.defined() || (is_plain(x) && x.scalar_type() == dtype && x.dim() > 0 && x.size(-1) == K &&
                            (K ? x.numel() / K : M) == M);
  }
};

// What fastlora.arguments.check lets pass, and the kernels take.
bool fits(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const Optional& bias, double p) {
  for (const Tensor* t : {&x, &weight, &A, &B})
    if (!is_plain(*t)) return false;
  if (x.dim() < 1 || weight.dim() != 2 || A.dim() != 2 || B.dim() != 2) return false;
  const int64_t N = weight.size(0), K = weight.size(1), R = A.size(0);
  const auto dtype = x.scalar_type();
  return x.size(-1) == K && A.size(1) == K && B.size(0) == N && B.size(1) == R && R > 0 && R <= fastlora::MAX_RANK &&
         weight.scalar_type() == dtype && kernels_take(x) && kernels_take(A) && B.scalar_type() == A.scalar_type() &&
         (!bias || (is_plain(*bias) && bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == dtype)) &&
         p >= 0.0 && p <= 1.0;
}

// The seven arguments of `lora_linear` and `run`: y, or None for what is left to Python.
template <bool CHOOSING>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7) return PyErr_Format(PyExc_TypeError, "7 arguments needed, got %zd", count);
  PyObject* bias_or_none = values[4];
  for (int i = 0; i < 4; ++i)
    if (!THPVariable_CheckExact(values[i])) Py_RETURN_NONE;
  if (bias_or_none != Py_None && !THPVariable_CheckExact(bias_or_none)) Py_RETURN_NONE;
  for (int i = 5; i < 7; ++i)
    if (!PyFloat_Check(values[i]) && !PyLong_Check(values[i])) Py_RETURN_NONE;
  const double scaling = PyFloat_AsDouble(values[5]), p = PyFloat_AsDouble(values[6]);
  if (PyErr_Occurred()) {  // an integer that no double holds
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const Tensor &x = THPVariable_Unpack(values[0]), &weight = THPVariable_Unpack(values[1]);
  const Tensor &A = THPVariable_Unpack(values[2]), &B = THPVariable_Unpack(values[3]);
  Optional bias;
  if (bias_or_none != Py_None) bias = THPVariable_Unpack(bias_or_none);
  if (!kernels || !fits(x, weight, A, B, bias, p) || weight.requires_grad() || !nobody_watches()) Py_RETURN_NONE;
  if (CHOOSING && !allowed[is_bfloat16(x)][is_bfloat16(A)][A.size(0)][p > 0.0]) Py_RETURN_NONE;

  Tensor y;
  {
    ReleasesGIL no_gil;
    const bool learns = x.requires_grad() || A.requires_grad() || B.requires_grad() || (bias && bias->requires_grad());
    y = learns && at::GradMode::is_enabled() ? LoRALinear::apply(x, weight, A, B, bias, scaling, p)
                                             : forward(x, weight, A, B, bias, scaling, p).y;
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// prepare(kernels, gradients, path): once, before anything else
PyObject* prepare(PyObject*, PyObject* arguments) {
  PyObject *capsule, *gradients, *path;
  if (!PyArg_ParseTuple(arguments, "OOO", &capsule, &gradients, &path)) return nullptr;
  const void* table = PyCapsule_GetPointer(capsule, fastlora::KERNELS);
  if (!table) return nullptr;
  kernels = static_cast<const fastlora::Kernels*>(table);
  path_cpu = Py_NewRef(path);
  python_gradients = Py_NewRef(gradients);
  Py_RETURN_NONE;
}

// allow(x16, adapter16, R, dropout)
PyObject* allow(PyObject*, PyObject* arguments) {
  int x16, adapter16, R, dropout;
  if (!PyArg_ParseTuple(arguments, "ppip", &x16, &adapter16, &R, &dropout)) return nullptr;
  if (R >= 0 && R <= fastlora::MAX_RANK) allowed[x16][adapter16][R][dropout] = true;
  Py_RETURN_NONE;
}

PyObject* forget(PyObject*, PyObject*) {
  std::memset(allowed, 0, sizeof allowed);
  Py_RETURN_NONE;
}

template <bool CHOOSING>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<CHOOSING>));
}

PyMethodDef methods[] = {
    {"lora_linear", fastcall<true>(), METH_FASTCALL, "y where path `cpu` was chosen; None: left to Python"},
    {"run", fastcall<false>(), METH_FASTCALL, "y by path `cpu`; None: left to Python"},
    {"prepare", prepare, METH_VARARGS, "hand over the kernels and what is left to Python"},
    {"allow", allow, METH_VARARGS, "say for which calls path `cpu` was chosen"},
    {"forget", forget, METH_NOARGS, "take back all that `allow` said"},
    {nullptr, nullptr, 0, nullptr},
};

#define FASTLORA_TEXT_OF(name) #name
#define FASTLORA_TEXT(name) FASTLORA_TEXT_OF(name)
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fastlora." FASTLORA_TEXT(FASTLORA_NAME), "Path `cpu` as an autograd node.", -1, methods,
    nullptr, nullptr, nullptr, nullptr};

}  // namespace

#define FASTLORA_INIT_OF(name) PyInit_##name
#define FASTLORA_INIT(name) FASTLORA_INIT_OF(name)
PyMODINIT_FUNC FASTLORA_INIT(FASTLORA_NAME)() { return PyModule_Create(&module); }
