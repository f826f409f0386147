// fastlora._node_<torch's version>: the layer as an autograd node of torch's own, for ordinary tensors; CPU and GPU.
//
// It does what fastlora/functional.py, autograd.py and ops.py do, with the same kernels, seeds and ATen calls, and
// saves most of the time that a small layer spends in Python. Path `cpu` runs here (node_cpu.h), and the records of what
// another path did (record.h). Which of them, says table.h. Whatever is out of the ordinary (a subclass, a
// function transform, a wrong shape, a gradient of another kind, a call that was not seen before) it leaves to Python,
// which explains and serves it: no message is written here. It is bound to one version of torch, which its name says,
// and optional: without it Python does it all.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/utils/wrap_outputs.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/random.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "layer.h"
#include "node_cpu.h"
#include "record.h"
#include "seeds.h"
#include "table.h"

namespace {

using at::Tensor;
using fastlora::Gradients;
using fastlora::Incoming;
using fastlora::Layer;
using fastlora::Optional;
using fastlora::Result;
using std::int64_t;
using torch::autograd::variable_list;

// Given once by `prepare`, and kept for good.
std::vector<PyObject*> paths;  // fastlora.paths.PATHS, then what has tiles of its own; a path is its place among them
int path_cpu = -1;
PyObject* python_gradients = nullptr;         // fastlora.autograd.gradients
PyObject* python_shared_gradients = nullptr;  // fastlora.shared_autograd.gradients
PyObject *python_forward = nullptr, *python_backward = nullptr;  // the ops of fastlora/ops.py

// ---- the gate: which tensors are ordinary ----

// Dense, of a CPU or a CUDA GPU, with memory of its own, not conjugated or negated, and nobody's wrapper: no other key
// is set.
bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet on_cpu({DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
                                           DispatchKey::AutocastCPU});
  static const c10::DispatchKeySet on_cuda({DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCUDA,
                                            DispatchKey::AutocastCUDA});
  static const c10::DispatchKeySet cpu(c10::BackendComponent::CPUBit), cuda(c10::BackendComponent::CUDABit);
  // a difference keeps the bit that says whose memory it is
  return (t.key_set() - on_cpu == cpu || t.key_set() - on_cuda == cuda) && t.has_storage();
}

bool nobody_watches() {
  return !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool is_seed(const Tensor& t, double p, c10::Device device) {
  if (!t.defined() || !(p > 0.0)) return !t.defined() && !(p > 0.0);
  return is_plain(t) && t.scalar_type() == at::kLong && t.numel() == 1 && t.device() == device &&
         reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// What fastlora.arguments.check lets pass.
bool fits(const Layer& layer) {
  const Tensor &x = layer.x, &weight = layer.weight, &A = layer.lora_A, &B = layer.lora_B;
  for (const Tensor* t : {&x, &weight, &A, &B})
    if (!is_plain(*t) || t->device() != x.device()) return false;
  if (x.dim() < 1 || weight.dim() != 2 || A.dim() != 2 || B.dim() != 2) return false;
  const int64_t N = weight.size(0), K = weight.size(1), R = A.size(0);
  const auto dtype = x.scalar_type();
  const Optional& bias = layer.bias;
  return x.size(-1) == K && A.size(1) == K && B.size(0) == N && B.size(1) == R && R > 0 && R <= fastlora::MAX_RANK &&
         weight.scalar_type() == dtype && B.scalar_type() == A.scalar_type() &&
         (!bias || (is_plain(*bias) && bias->device() == x.device() && bias->dim() == 1 && bias->size(0) == N &&
                    bias->scalar_type() == dtype)) &&
         layer.p >= 0.0 && layer.p <= 1.0;
}

// Hooks of saved tensors may have changed them, and the kernels read addresses.
bool fits(const Incoming& in) {
  const Tensor &dy = in.dy, &A = in.lora_A, &B = in.lora_B, &S = in.S;
  for (const Tensor* t : {&dy, &A, &B, &S})
    if (!is_plain(*t) || t->device() != dy.device()) return false;
  if (dy.dim() < 1 || A.dim() != 2 || B.dim() != 2 || S.dim() != 2) return false;
  const auto dtype = dy.scalar_type();
  const int64_t N = dy.size(-1), M = N ? dy.numel() / N : S.size(0), R = A.size(0), K = A.size(1);
  if (B.scalar_type() != A.scalar_type() || R > fastlora::MAX_RANK) return false;
  if (S.scalar_type() != dtype || S.size(0) != M || S.size(1) != R || B.size(0) != N || B.size(1) != R) return false;
  if (!is_seed(in.seed, in.p, dy.device())) return false;
  const Tensor &x = in.x, &weight = in.weight;
  if (weight.defined() && (!is_plain(weight) || weight.device() != dy.device() || weight.scalar_type() != dtype ||
                           weight.dim() != 2 || weight.size(0) != N || weight.size(1) != K))
    return false;
  return !x.defined() || (is_plain(x) && x.device() == dy.device() && x.scalar_type() == dtype && x.dim() > 0 &&
                          x.size(-1) == K && (K ? x.numel() / K : M) == M);
}

// ---- the plan: what computes a call that fits ----

struct Plan {
  int path;
  std::shared_ptr<const fastlora::Record> record;  // null for path `cpu`
  void* stream;
};
typedef std::optional<Plan> MaybePlan;

const Tensor& first(const Layer& layer) { return layer.x; }
const Tensor& first(const Incoming& in) { return in.dy; }

// The stream on which a record may run: the current one of the current device; on a CPU there is none.
fastlora::Stream stream_for(const Tensor& t) {
  if (t.is_cpu()) return {true, nullptr};
  if (!fastlora::driver()) return {false, nullptr};
  const fastlora::Stream stream = fastlora::current_stream(t.device());
  if (stream.known) fastlora::ensure_context(t.device());
  return stream;
}

// ATen draws masks on a CPU by a generator, which no record holds.
bool recordable(const Tensor& t, double p) { return t.is_cuda() || !(p > 0.0); }

// The record of a call whose first tensor is `t`, if there is one.
template <typename KeyOf>
MaybePlan plan_of_record(int path, const Tensor& t, double p, const KeyOf& key) {
  if (!recordable(t, p)) return std::nullopt;
  const auto record = fastlora::records.find(key());
  if (!record || !*record) return std::nullopt;
  const fastlora::Stream stream = stream_for(t);
  return stream.known ? MaybePlan({path, *record, stream.handle}) : std::nullopt;
}

template <typename Call>
MaybePlan plan(int path, const Call& call) {
  const Tensor& t = first(call);
  if (path == path_cpu) {
    using namespace fastlora::cpu;
    const bool ours = t.device().is_cpu() && kernels && takes(t) && takes(call.lora_A);
    return ours ? MaybePlan({path, nullptr, nullptr}) : std::nullopt;
  }
  return plan_of_record(path, t, call.p, [&] { return fastlora::record_key(path, call); });
}

bool is_captured(const Plan& plan, const Tensor& t) {
  int capturing = 0;
  return t.is_cuda() && (fastlora::driver()->cuStreamIsCapturing(plan.stream, &capturing) || capturing);
}

// The same for the path that was chosen. Into a graph goes what Python chooses for graphs.
template <typename Call>
MaybePlan chosen_plan(const Tensor& x, const Tensor& weight, const Call& call) {
  const auto path = fastlora::chosen.find(fastlora::choice_key(x, weight, call.lora_A, call.p > 0.0));
  MaybePlan found = path ? plan(*path, call) : std::nullopt;
  return found && is_captured(*found, x) ? std::nullopt : found;
}

Tensor drawn(at::IntArrayRef sizes, c10::Device device, const Plan& plan) {
  if (device.is_cpu()) return at::empty(sizes, at::kLong).random_(0, std::numeric_limits<int64_t>::max());
  const Tensor made = plan.record->empty(sizes, at::kLong, device);
  return fastlora::write_seeds(plan.stream, made) ? made : made.random_(0, std::numeric_limits<int64_t>::max());
}

Tensor draw_seed(double p, c10::Device device, const Plan& plan) {  // fastlora.paths.problem.draw_seed
  if (!(p > 0.0)) return Tensor();
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  return drawn({}, device, plan);
}

Result forward(const Plan& plan, const Layer& layer) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  if (!plan.record) return fastlora::cpu::forward(layer);
  const Tensor none;
  const Tensor* inputs[] = {&layer.x,      &layer.weight,
                            &layer.lora_A, &layer.lora_B,
                            layer.bias ? &*layer.bias : &none, &layer.seed};
  Tensor found[2];
  plan.record->run(inputs, 6, found, plan.stream);
  return {std::move(found[0]), std::move(found[1])};
}

// Path `torch` computes the gradients of adapters in x's dtype.
Tensor as(const Tensor& like, const Tensor& t) {
  return t.scalar_type() == like.scalar_type() ? t : t.to(like.scalar_type());
}

Gradients backward(const Plan& plan, const Incoming& in) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  if (!plan.record) return fastlora::cpu::backward(in);
  const Tensor* inputs[] = {&in.dy, &in.x, &in.weight, &in.lora_A, &in.lora_B, &in.S, &in.seed};
  Tensor found[3];
  plan.record->run(inputs, 7, found, plan.stream);
  Gradients gradients;
  std::size_t next = 0;
  if (in.weight.defined()) gradients.dx = std::move(found[next++]);
  if (in.x.defined()) gradients.dA = as(in.lora_A, found[next++]);
  if (in.need_B) gradients.dB = as(in.lora_B, found[next++]);
  return gradients;
}

// ---- Python ----

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

Owned wrapped(const Tensor& t) { return Owned(t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None)); }

bool is_cuda(PyObject* tensors, Py_ssize_t i) { return THPVariable_Unpack(PyTuple_GET_ITEM(tensors, i)).is_cuda(); }

// Python's error as a C++ exception, which may be caught in another thread.
[[noreturn]] void raise() {
  python_error error;
  error.persist();
  throw error;
}

// The tensors of a tuple, undefined for None.
template <std::size_t COUNT>
std::array<Tensor, COUNT> unwrapped(const Owned& tuple) {
  if (!tuple) raise();
  std::array<Tensor, COUNT> found;
  for (std::size_t i = 0; i < COUNT; ++i) {
    PyObject* one = PyTuple_GetItem(tuple.get(), i);
    if (one && one != Py_None) found[i] = THPVariable_Unpack(one);
  }
  return found;
}

// What is asked for of dx, dA, dB and dbias; undefined where it is not.
struct Needs {
  bool x, A, B, bias;
};

variable_list backward_in_python(const Tensor& dy, const variable_list& saved, PyObject* packed, double scaling,
                                 double p, int path, const Needs& needs) {
  HoldsGIL gil;
  const Owned held[7] = {wrapped(dy),       wrapped(saved[0]), packed ? Owned(Py_NewRef(packed)) : wrapped(saved[1]),
                         wrapped(saved[2]), wrapped(saved[3]), wrapped(saved[4]), wrapped(saved[5])};
  const Owned tuple(PyObject_CallFunction(python_gradients, "OOOOOOOddO(iiii)", held[0].get(), held[1].get(),
                                          held[2].get(), held[3].get(), held[4].get(), held[5].get(), held[6].get(),
                                          scaling, p, paths[path], needs.x, needs.A, needs.B, needs.bias));
  const auto found = unwrapped<4>(tuple);
  return {found.begin(), found.end()};
}

// A fastlora.packed.Packed for as long as a node lives.
struct Kept : torch::CustomClassHolder {
  PyObject* object;
  explicit Kept(PyObject* packed) : object(packed) {
    HoldsGIL gil;
    Py_INCREF(object);
  }
  ~Kept() override {
    if (!Py_IsInitialized()) return;
    HoldsGIL gil;
    Py_DECREF(object);
  }
};

Tensor dense(PyObject* packed) {
  HoldsGIL gil;
  const Owned made(PyObject_CallMethod(packed, "dense", nullptr));
  if (!made) raise();
  return THPVariable_Unpack(made.get());
}

// ---- the node ----

// Zeros of x's shape in no memory, with x's history: see fastlora.autograd._shadow.
Tensor shadow(const Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView no_views;
  const Tensor zeros = at::zeros({}, x.options()).expand(x.sizes());
  torch::autograd::impl::set_gradient_edge(zeros, torch::autograd::impl::gradient_edge(x));
  return zeros;
}

// dx (M, K) with the leading sizes of dy.
Tensor shaped(const Tensor& dx, const Tensor& dy) {
  if (dy.dim() == 2) return dx;
  auto shape = dy.sizes().vec();
  shape.back() = dx.size(1);
  return dx.view(shape);
}

struct LoRALinear : torch::autograd::Function<LoRALinear> {
  // Only what may get a gradient stands before `layer`: torch keeps sizes of each.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& lora_A,
                        const Tensor& lora_B, const Optional& bias, const Layer& layer, const Plan& plan) {
    const Result result = ::forward(plan, layer);
    const Tensor kept = lora_A.requires_grad()                        ? x
                        : x.requires_grad() && lora_B.requires_grad() ? shadow(x)
                                                                      : Tensor();
    const bool need_weight = x.requires_grad();
    const Tensor weight = need_weight && !layer.packed ? layer.weight : Tensor();
    if (need_weight && layer.packed)
      ctx->saved_data["packed"] = at::IValue::make_capsule(c10::make_intrusive<Kept>(layer.packed));
    ctx->save_for_backward({kept, weight, lora_A, lora_B, result.S, layer.seed});
    // one entry, for the map that holds them is slow; a list, for compiled autograd looks into it
    ctx->saved_data["call"] = c10::List<double>({layer.scaling, layer.p, double(plan.path), double(bias.has_value())});
    return result.y;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& incoming) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor& dy = incoming[0];
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<double> numbers = ctx->saved_data["call"].toDoubleList();
    const double scaling = numbers.get(0), p = numbers.get(1);
    const int path = static_cast<int>(numbers.get(2));
    const bool bias = numbers.get(3) != 0.0;
    const Needs needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                      bias && ctx->needs_input_grad(3)};
    const auto found = ctx->saved_data.find("packed");
    const auto kept = found == ctx->saved_data.end() ? nullptr : found->second.toCapsule();
    PyObject* packed = kept ? static_cast<Kept*>(kept.get())->object : nullptr;
    const bool plain = !at::GradMode::is_enabled() && nobody_watches();
    Tensor weight = needs.x ? saved[1] : Tensor();
    if (needs.x && packed && plain) weight = dense(packed);
    const Incoming in{dy, needs.A ? saved[0] : Tensor(), weight, saved[2], saved[3], saved[4], saved[5], scaling, p,
                      needs.B};
    const MaybePlan plan = plain && fits(in) ? ::plan(path, in) : std::nullopt;
    variable_list g = plan ? gradients(*plan, in, needs)
                           : backward_in_python(dy, saved, needs.x ? packed : nullptr, scaling, p, path, needs);
    return {g[0], g[1], g[2], g[3], Tensor(), Tensor()};
  }

 private:
  static variable_list gradients(const Plan& plan, const Incoming& in, const Needs& needs) {
    Gradients found = ::backward(plan, in);
    return {needs.x ? shaped(found.dx, in.dy) : Tensor(), found.dA, found.dB,
            needs.bias ? fastlora::rows_of(in.dy).sum(0) : Tensor()};
  }
};

// The tensors and numbers of a call of Python's, if they are of the exact types.
bool parsed(PyObject* const* values, Optional& bias, double& scaling, double& p) {
  for (int i = 0; i < 4; ++i)
    if (!THPVariable_CheckExact(values[i])) return false;
  if (values[4] != Py_None) {
    if (!THPVariable_CheckExact(values[4])) return false;
    bias = THPVariable_Unpack(values[4]);
  }
  for (int i = 5; i < 7; ++i)
    if (!PyFloat_Check(values[i]) && !PyLong_Check(values[i])) return false;
  scaling = PyFloat_AsDouble(values[5]), p = PyFloat_AsDouble(values[6]);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an integer that no double holds
  return false;
}

// Whether backward is to be compiled, whose cache has no key for a Packed that a node keeps.
bool compiles_backward() {
  static PyObject* const name = PyUnicode_InternFromString("torch._dynamo.compiled_autograd");
  const Owned module(PyImport_GetModule(name));  // null: nobody has asked for it
  if (!module) return PyErr_Clear(), false;
  const Owned enabled(PyObject_GetAttrString(module.get(), "compiled_autograd_enabled"));
  if (!enabled) PyErr_Clear();
  return !enabled || enabled.get() != Py_False;
}

// y, or None for what is left to Python; `path` is negative for the chosen one. The eighth value is what the weight was
// dequantised from, or None.
PyObject* call(int path, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7 && count != 8) return PyErr_Format(PyExc_TypeError, "7 or 8 arguments needed, got %zd", count);
  Optional bias;
  double scaling, p;
  if (!parsed(values, bias, scaling, p)) Py_RETURN_NONE;
  const Tensor &x = THPVariable_Unpack(values[0]), &weight = THPVariable_Unpack(values[1]);
  const Tensor &A = THPVariable_Unpack(values[2]), &B = THPVariable_Unpack(values[3]);
  Layer layer{x, weight, A, B, bias, scaling, p, Tensor(), count == 8 && values[7] != Py_None ? values[7] : nullptr};
  if (!fits(layer) || weight.requires_grad() || !nobody_watches()) Py_RETURN_NONE;
  if (layer.packed && compiles_backward()) Py_RETURN_NONE;
  const MaybePlan plan = path < 0 ? chosen_plan(x, weight, layer) : ::plan(path, layer);
  if (!plan) Py_RETURN_NONE;
  Tensor y;
  {
    ReleasesGIL no_gil;
    layer.seed = draw_seed(p, x.device(), *plan);
    const bool learns = x.requires_grad() || A.requires_grad() || B.requires_grad() || (bias && bias->requires_grad());
    y = learns && at::GradMode::is_enabled() ? LoRALinear::apply(x, A, B, bias, layer, *plan)
                                             : forward(*plan, layer).y;
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// ---- the ops, for compilers: fastlora/ops.py gives them fakes and gradients ----

std::tuple<Tensor, Tensor> op_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                      const Optional& bias, double scaling, double p, const Optional& seed,
                                      c10::string_view path) {
  const Layer layer{x, weight, lora_A, lora_B, bias, scaling, p, seed.value_or(Tensor())};
  if (path.empty() && nobody_watches() && fits(layer) && is_seed(layer.seed, p, x.device())) {
    if (const MaybePlan plan = chosen_plan(x, weight, layer)) {
      Result result = forward(*plan, layer);
      return {std::move(result.y), std::move(result.S)};
    }
  }
  HoldsGIL gil;
  const Owned held[] = {wrapped(x), wrapped(weight), wrapped(lora_A), wrapped(lora_B), wrapped(bias.value_or(Tensor())),
                        wrapped(layer.seed)};
  const auto found = unwrapped<2>(Owned(PyObject_CallFunction(
      python_forward, "OOOOOddOs#", held[0].get(), held[1].get(), held[2].get(), held[3].get(), held[4].get(), scaling,
      p, held[5].get(), path.data(), static_cast<Py_ssize_t>(path.size()))));
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor, Tensor> op_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                               const Tensor& lora_A, const Tensor& lora_B, const Tensor& S,
                                               double scaling, double p, const Optional& seed, c10::string_view path,
                                               bool need_x, bool need_A, bool need_B) {
  const Incoming in{dy, need_A ? x : Tensor(), need_x ? weight : Tensor(), lora_A, lora_B, S, seed.value_or(Tensor()),
                    scaling, p, need_B};
  if (path.empty() && nobody_watches() && fits(in) && x.dim() > 0 && weight.dim() == 2) {
    if (const MaybePlan plan = chosen_plan(x, weight, in)) {
      const Gradients found = backward(*plan, in);
      return {need_x ? found.dx.view(x.sizes()) : at::empty({0}, x.options()),
              need_A ? found.dA : at::empty({0}, lora_A.options()),
              need_B ? found.dB : at::empty({0}, lora_B.options())};
    }
  }
  HoldsGIL gil;
  const Owned held[] = {wrapped(dy), wrapped(x), wrapped(weight), wrapped(lora_A), wrapped(lora_B), wrapped(S),
                        wrapped(in.seed)};
  const auto found = unwrapped<3>(Owned(PyObject_CallFunction(
      python_backward, "OOOOOOddOs#iii", held[0].get(), held[1].get(), held[2].get(), held[3].get(), held[4].get(),
      held[5].get(), scaling, p, held[6].get(), path.data(), static_cast<Py_ssize_t>(path.size()), need_x, need_A,
      need_B)));
  return {found[0], found[1], found[2]};
}

TORCH_LIBRARY_FRAGMENT(fastlora, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, float dropout_p, "
      "Tensor? seed, str path) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.def(
      "backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, float scaling, "
      "float dropout_p, Tensor? seed, str path, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  library.impl("forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(op_forward));
  library.impl("backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(op_backward));
}

// A path with tiles of its own (Path.with_tiles) is met here for the first time.
int path_of(PyObject* object) {
  for (std::size_t i = 0; i < paths.size(); ++i)
    if (paths[i] == object) return static_cast<int>(i);
  paths.push_back(Py_NewRef(object));
  return static_cast<int>(paths.size() - 1);
}

}  // namespace

#include "node_shared.h"

namespace {

// ---- the module ----

PyObject* lora_linear(PyObject*, PyObject* const* values, Py_ssize_t count) { return call(-1, values, count); }

PyObject* run(PyObject*, PyObject* const* values, Py_ssize_t count) {
  const int path = count ? path_of(values[0]) : -1;
  if (path < 0) Py_RETURN_NONE;
  return call(path, values + 1, count - 1);
}

// prepare(kernels or None, gradients, those of projections that share x, paths, the place of `cpu` among them): once,
// before anything else
PyObject* prepare(PyObject*, PyObject* arguments) {
  PyObject *capsule, *gradients, *shared_gradients, *all;
  if (!PyArg_ParseTuple(arguments, "OOOO!i", &capsule, &gradients, &shared_gradients, &PyTuple_Type, &all, &path_cpu))
    return nullptr;
  if (capsule != Py_None) {
    const void* table = PyCapsule_GetPointer(capsule, fastlora::KERNELS);
    if (!table) return nullptr;
    fastlora::cpu::kernels = static_cast<const fastlora::Kernels*>(table);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(all); ++i) paths.push_back(Py_NewRef(PyTuple_GET_ITEM(all, i)));
  python_gradients = Py_NewRef(gradients);
  python_shared_gradients = Py_NewRef(shared_gradients);
  Py_RETURN_NONE;
}

// serve(forward, backward): what the ops call where no plan is known
PyObject* serve(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO", &python_forward, &python_backward)) return nullptr;
  Py_INCREF(python_forward);
  Py_INCREF(python_backward);
  Py_RETURN_NONE;
}

// choose(path, x, weight, lora_A, dropout)
PyObject* choose(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *path, *x, *weight, *lora_A;
  int dropout;
  if (!PyArg_ParseTuple(arguments, "OOOOp", &path, &x, &weight, &lora_A, &dropout)) return nullptr;
  const bool exact = THPVariable_CheckExact(x) && THPVariable_CheckExact(weight) && THPVariable_CheckExact(lora_A);
  if (exact)
    fastlora::chosen.insert(
        fastlora::choice_key(THPVariable_Unpack(x), THPVariable_Unpack(weight), THPVariable_Unpack(lora_A), dropout),
        path_of(path));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  fastlora::chosen.clear();
  fastlora::records.clear();
  fastlora::met.clear();
  Py_RETURN_NONE;
}

// The key of (path, tensors, scaling, p, need_B): tensors are forward's six or backward's seven, in the order of a
// record's inputs. None where no record could serve them.
std::optional<fastlora::Key> key_of(PyObject* path_object, PyObject* tensors, double scaling, double p, bool need_B) {
  const int path = path_of(path_object);
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  if (path < 0 || path == path_cpu || count < 6 || count > 7) return std::nullopt;
  std::array<Tensor, 7> t;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* one = PyTuple_GET_ITEM(tensors, i);
    if (one == Py_None) continue;
    if (!THPVariable_CheckExact(one)) return std::nullopt;
    t[i] = THPVariable_Unpack(one);
  }
  if (!t[0].defined() || !is_plain(t[0]) || !recordable(t[0], p) || !stream_for(t[0]).known)
    return std::nullopt;
  if (count == 7) {
    const Incoming in{t[0], t[1], t[2], t[3], t[4], t[5], t[6], scaling, p, need_B};
    return fits(in) ? std::optional(fastlora::record_key(path, in)) : std::nullopt;
  }
  const Optional bias = t[4].defined() ? Optional(t[4]) : std::nullopt;
  const Layer layer{t[0], t[1], t[2], t[3], bias, scaling, p, t[5]};
  if (!fits(layer) || !is_seed(t[5], p, t[0].device())) return std::nullopt;
  return fastlora::record_key(path, layer);
}

// lacks(path, tensors, scaling, p, need_B): whether a record of this call would be of use
PyObject* lacks(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *path, *tensors;
  double scaling, p;
  int need_B;
  if (!PyArg_ParseTuple(arguments, "OO!ddp", &path, &PyTuple_Type, &tensors, &scaling, &p, &need_B)) return nullptr;
  return PyBool_FromLong(fastlora::lacks(key_of(path, tensors, scaling, p, need_B), is_cuda(tensors, 0)));
  END_HANDLE_TH_ERRORS
}

// keep(path, tensors, scaling, p, need_B, record or None)
PyObject* keep(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *path, *tensors, *object;
  double scaling, p;
  int need_B;
  if (!PyArg_ParseTuple(arguments, "OO!ddpO", &path, &PyTuple_Type, &tensors, &scaling, &p, &need_B, &object))
    return nullptr;
  const auto key = key_of(path, tensors, scaling, p, need_B);
  if (!key) Py_RETURN_NONE;
  std::shared_ptr<const fastlora::Record> record;
  if (object != Py_None) {
    record = fastlora::Record::parse(object, THPVariable_Unpack(PyTuple_GET_ITEM(tensors, 0)));
    if (!record) return nullptr;
  }
  fastlora::records.insert(*key, record);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// replay(library, record, tensors): the outputs of a record, on any tensors, by another library than the driver's
PyObject* replay(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  const char* library;
  PyObject *object, *tensors;
  if (!PyArg_ParseTuple(arguments, "sOO!", &library, &object, &PyTuple_Type, &tensors)) return nullptr;
  variable_list inputs(PyTuple_GET_SIZE(tensors));
  std::vector<const Tensor*> addresses;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(tensors, i);
    if (one != Py_None) inputs[i] = THPVariable_Unpack(one);
    addresses.push_back(&inputs[i]);
  }
  const auto record = fastlora::Record::parse(object, inputs.at(0));
  if (!record) return nullptr;
  TORCH_CHECK(fastlora::driver(library), "no driver in ", library);
  variable_list found(record->outputs());
  record->run(addresses.data(), addresses.size(), found.data(), nullptr);
  return torch::autograd::utils::wrap(found);
  END_HANDLE_TH_ERRORS
}

// randint(seed, offset, thread): what torch.randint(2**63 - 1, ...) draws on a GPU
PyObject* randint(PyObject*, PyObject* arguments) {
  unsigned long long seed, offset, thread;
  if (!PyArg_ParseTuple(arguments, "KKK", &seed, &offset, &thread)) return nullptr;
  return PyLong_FromLongLong(fastlora::randint_on_gpu(seed, offset, thread));
}

// write_seeds(generator, tensor): whether they were written to it, for kernels of the current stream
PyObject* write_seeds(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *generator, *tensor;
  if (!PyArg_ParseTuple(arguments, "O!O", THPGeneratorClass, &generator, &tensor)) return nullptr;
  const Tensor& made = THPVariable_Unpack(tensor);
  const fastlora::Stream stream = stream_for(made);
  return PyBool_FromLong(stream.known && fastlora::write_seeds(reinterpret_cast<THPGenerator*>(generator)->cdata,
                                                               stream.handle, made));
  END_HANDLE_TH_ERRORS
}

// trust_seeds(device): they were compared there
PyObject* trust_seeds(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index >= 0 && index < 64) fastlora::seeds_agree[index] = true;
  Py_RETURN_NONE;
}

template <auto FUNCTION>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(FUNCTION));
}

PyMethodDef methods[] = {
    {"lora_linear", fastcall<lora_linear>(), METH_FASTCALL, "y by the path that was chosen; None: left to Python"},
    {"run", fastcall<run>(), METH_FASTCALL, "y by the path given; None: left to Python"},
    {"prepare", prepare, METH_VARARGS, "hand over the kernels, the paths, and what is left to Python"},
    {"serve", serve, METH_VARARGS, "hand over what the ops leave to Python"},
    {"choose", choose, METH_VARARGS, "say for which calls a path was chosen"},
    {"forget", forget, METH_NOARGS, "take back all that was chosen and recorded"},
    {"lacks", lacks, METH_VARARGS, "whether a record of this call would be of use"},
    {"keep", keep, METH_VARARGS, "hand over the record of a call, or None: there is none"},
    {"lora_linears", fastcall<lora_linears>(), METH_FASTCALL, "y of projections that share x; None: left to Python"},
    {"run_shared", fastcall<run_shared>(), METH_FASTCALL, "the same by the path given"},
    {"choose_shared", fastcall<choose_shared>(), METH_FASTCALL, "say for which projections a path was chosen"},
    {"lacks_shared", lacks_shared, METH_VARARGS, "whether a record of these projections would be of use"},
    {"keep_shared", keep_shared, METH_VARARGS, "hand over the record of projections that share x, or None"},
    {"randint", randint, METH_VARARGS, "what torch.randint draws on a GPU"},
    {"write_seeds", write_seeds, METH_VARARGS, "write what it would draw, without a launch"},
    {"trust_seeds", trust_seeds, METH_O, "say that what is written is the same on this device"},
    {"replay", replay, METH_VARARGS, "run a record by another library than the driver's, for tests"},
    {nullptr, nullptr, 0, nullptr},
};

#define FASTLORA_TEXT_OF(name) #name
#define FASTLORA_TEXT(name) FASTLORA_TEXT_OF(name)
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fastlora." FASTLORA_TEXT(FASTLORA_NAME), "The layer as an autograd node.", -1, methods,
    nullptr, nullptr, nullptr, nullptr};

}  // namespace

#define FASTLORA_INIT_OF(name) PyInit_##name
#define FASTLORA_INIT(name) FASTLORA_INIT_OF(name)
PyMODINIT_FUNC FASTLORA_INIT(FASTLORA_NAME)() { return PyModule_Create(&module); }
