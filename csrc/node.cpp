// fastlora._node_<torch's version>: the layer as an autograd node of torch's own, for ordinary tensors; CPU and GPU.
//
// It does what fastlora/functional.py, shared.py, autograd.py and ops.py do, with the same kernels, seeds and ATen calls,
// and saves most of the time that a small layer spends in Python. A call is of one projection of x, or of several. Path
// `cpu` runs here (node_cpu.h), and the records of what another path did (record.h). Which of them, says table.h. Whatever
// is out of the ordinary (a subclass, a function transform, a wrong shape, a gradient of another kind, a call that was not
// seen before) it leaves to Python, which explains and serves it: no message is written here. It is bound to one version
// of torch, which its name says, and optional: without it Python does it all.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/utils/wrap_outputs.h>
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
#include "gate.h"
#include "layer.h"
#include "node_cpu.h"
#include "record.h"
#include "seeds.h"
#include "table.h"

namespace {

using at::Tensor;
using fastlora::Gradients;
using fastlora::Incoming;
using fastlora::Incomings;
using fastlora::is_plain;
using fastlora::is_seed;
using fastlora::Layer;
using fastlora::Layers;
using fastlora::MOST;
using fastlora::nobody_watches;
using fastlora::Results;
using std::int64_t;
using torch::autograd::variable_list;
typedef std::optional<Tensor> Optional;

// Given once by `prepare`, and kept for good.
std::vector<PyObject*> paths;  // fastlora.paths.PATHS, then what has tiles of its own; a path is its place among them
int path_cpu = -1;
PyObject* python_gradients = nullptr;                            // fastlora.autograd.gradients
PyObject *python_forward = nullptr, *python_backward = nullptr;  // the ops of fastlora/ops.py

// ---- the plan: what computes a call that fits ----

struct Plan {
  int path;
  std::shared_ptr<const fastlora::Record> record;  // null for path `cpu`
  void* stream;
};
typedef std::optional<Plan> MaybePlan;

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

// Who computes a call by this path: path `cpu`, or a record.
template <typename Calls>
MaybePlan plan(int path, const Calls& each) {
  const Tensor& t = first(each[0]);
  if (path == path_cpu) {
    if (!t.device().is_cpu() || !fastlora::cpu::kernels || !fastlora::cpu::takes(t)) return std::nullopt;
    for (const auto& one : each)
      if (!fastlora::cpu::takes(one.lora_A)) return std::nullopt;
    return MaybePlan({path, nullptr, nullptr});
  }
  if (!recordable(t, each[0].p)) return std::nullopt;
  const auto record = fastlora::records.find(fastlora::record_key(path, each));
  if (!record || !*record) return std::nullopt;
  const fastlora::Stream stream = stream_for(t);
  return stream.known ? MaybePlan({path, *record, stream.handle}) : std::nullopt;
}

// The same for the path that was chosen. Into a graph goes what Python chooses for graphs.
template <typename Calls>
MaybePlan chosen_plan(const fastlora::Key& choice, const Calls& each) {
  const auto path = fastlora::chosen.find(choice);
  MaybePlan found = path ? plan(*path, each) : std::nullopt;
  int capturing = 0;
  if (found && first(each[0]).is_cuda() &&
      (fastlora::driver()->cuStreamIsCapturing(found->stream, &capturing) || capturing))
    return std::nullopt;
  return found;
}

// ---- a call that fits, by its plan ----

Tensor drawn(at::IntArrayRef sizes, c10::Device device, const Plan& plan) {
  if (device.is_cpu()) return at::empty(sizes, at::kLong).random_(0, std::numeric_limits<int64_t>::max());
  const Tensor made = plan.record->empty(sizes, at::kLong, device);
  return fastlora::write_seeds(plan.stream, made) ? made : made.random_(0, std::numeric_limits<int64_t>::max());
}

// fastlora.paths.problem.draw_seeds: on a GPU the columns of one draw, views made without the dispatcher.
void draw_seeds(Layers& each, const Plan& plan) {
  if (!(each[0].p > 0.0)) return;
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const c10::Device device = each[0].x.device();
  if (device.is_cpu() || each.size() == 1) {
    for (Layer& one : each) one.seed = drawn({}, device, plan);
    return;
  }
  const Tensor all = drawn({static_cast<int64_t>(each.size()), 2}, device, plan);
  for (std::size_t i = 0; i < each.size(); ++i) {
    each[i].seed = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(all.storage()),
                                                            all.key_set(), all.dtype());
    each[i].seed.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(), at::IntArrayRef(),
                                                              static_cast<int64_t>(2 * i));
  }
}

Results forward(const Plan& plan, const Layers& each) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  Results made;
  if (!plan.record) {
    for (const Layer& one : each) made.push_back(fastlora::cpu::forward(one));
    return made;
  }
  const Tensor* inputs[1 + 5 * MOST] = {&each[0].x};
  std::size_t count = 1;
  for (const Layer& one : each)
    for (const Tensor* t : {&one.weight, &one.lora_A, &one.lora_B, &one.bias, &one.seed}) inputs[count++] = t;
  Tensor found[2 * MOST];
  plan.record->run(inputs, count, found, plan.stream);
  for (std::size_t i = 0; i < each.size(); ++i)
    made.push_back({std::move(found[i]), std::move(found[each.size() + i])});
  return made;
}

// Path `torch` computes the gradients of adapters in x's dtype.
Tensor as(const Tensor& like, const Tensor& t) {
  return t.scalar_type() == like.scalar_type() ? t : t.to(like.scalar_type());
}

c10::SmallVector<Gradients, 1> backward(const Plan& plan, const Incomings& each) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  c10::SmallVector<Gradients, 1> made(each.size());
  if (!plan.record) {
    Tensor dx;
    for (std::size_t i = 0; i < each.size(); ++i) {
      made[i] = fastlora::cpu::backward(each[i], dx);
      dx = made[i].dx;
    }
    made[0].dx = dx;
    return made;
  }
  const Tensor none, *inputs[1 + 6 * MOST] = {&none};
  std::size_t count = 1, next = 0;
  for (const Incoming& in : each) {
    if (in.x.defined()) inputs[0] = &in.x;
    for (const Tensor* t : {&in.dy, &in.weight, &in.lora_A, &in.lora_B, &in.S, &in.seed}) inputs[count++] = t;
  }
  Tensor found[1 + 2 * MOST];
  plan.record->run(inputs, count, found, plan.stream);
  if (each[0].weight.defined()) made[0].dx = std::move(found[next++]);
  for (std::size_t i = 0; i < each.size(); ++i)
    if (each[i].x.defined()) made[i].dA = as(each[i].lora_A, found[next++]);
  for (std::size_t i = 0; i < each.size(); ++i)
    if (each[i].need_B) made[i].dB = as(each[i].lora_B, found[next++]);
  return made;
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

// Python's error as a C++ exception, which may be caught in another thread.
[[noreturn]] void raise() {
  python_error error;
  error.persist();
  throw error;
}

// The tensors of a sequence, undefined for None.
variable_list unwrapped(const Owned& sequence) {
  const Owned tuple(sequence ? PySequence_Tuple(sequence.get()) : nullptr);
  if (!tuple) raise();
  variable_list found(PyTuple_GET_SIZE(tuple.get()));
  for (std::size_t i = 0; i < found.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(tuple.get(), i);
    if (one != Py_None) found[i] = THPVariable_Unpack(one);
  }
  return found;
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

bool learns(const Layer& one) {
  return one.x.requires_grad() || one.lora_A.requires_grad() || one.lora_B.requires_grad() ||
         (one.bias.defined() && one.bias.requires_grad());
}

// Kept: x, then weight, lora_A, lora_B, S and seed of each; the numbers path and p, then of each scaling, and whether it
// has a bias.
struct LoRALinears : torch::autograd::Function<LoRALinears> {
  // Only what may get a gradient stands before `each`: torch keeps sizes of it. `trained`: lora_A, lora_B and the bias, if
  // any, of each.
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x, at::TensorList trained,
                               const Layers& each, const Plan& plan) {
    Results made = ::forward(plan, each);
    const bool need_x = x.requires_grad();
    const bool any_A = std::any_of(each.begin(), each.end(), [](auto& one) { return one.lora_A.requires_grad(); });
    const bool any_B = std::any_of(each.begin(), each.end(), [](auto& one) { return one.lora_B.requires_grad(); });
    variable_list saved{any_A ? x : need_x && any_B ? shadow(x) : Tensor()}, ys;
    saved.reserve(1 + 5 * each.size());
    ys.reserve(each.size());
    c10::List<double> numbers({double(plan.path), each[0].p});  // what compiled autograd can look into
    for (std::size_t i = 0; i < each.size(); ++i) {
      const Layer& one = each[i];
      const Tensor weight = need_x && !one.packed ? one.weight : Tensor();
      for (const Tensor& t : {weight, one.lora_A, one.lora_B, made[i].S, one.seed}) saved.push_back(t);
      for (const double number : {one.scaling, double(one.bias.defined())}) numbers.push_back(number);
      ys.push_back(std::move(made[i].y));
    }
    if (need_x && each[0].packed)
      ctx->saved_data["packed"] = at::IValue::make_capsule(c10::make_intrusive<Kept>(each[0].packed));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = std::move(numbers);  // one entry, for the map that holds them is slow
    ctx->set_materialize_grads(false);
    return ys;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& dys) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const c10::List<double> numbers = ctx->saved_data["call"].toDoubleList();
    const std::size_t n = dys.size();
    // as Python has them: x, then lora_A, lora_B and bias of each
    bool needs[1 + 3 * MOST] = {ctx->needs_input_grad(0)};
    const auto trained = [&](std::size_t i) { return numbers.get(3 + 2 * i) != 0.0 ? 3 : 2; };
    std::size_t inputs = 1;
    for (std::size_t i = 0; i < n; ++i)
      for (int j = 0; j < trained(i); ++j) needs[1 + 3 * i + j] = ctx->needs_input_grad(inputs++);
    const auto found = ctx->saved_data.find("packed");
    const auto kept = found == ctx->saved_data.end() ? nullptr : found->second.toCapsule();
    PyObject* packed = kept && needs[0] ? static_cast<Kept*>(kept.get())->object : nullptr;
    variable_list g = fused(dys, saved, numbers, needs, packed);
    if (g.empty()) g = in_python(dys, saved, numbers, needs, packed);
    variable_list ordered{std::move(g[0])};
    ordered.reserve(inputs + 2);
    for (std::size_t i = 0; i < n; ++i)
      for (int j = 0; j < trained(i); ++j) ordered.push_back(std::move(g[1 + 3 * i + j]));
    ordered.resize(inputs + 2);  // of what is no tensor
    return ordered;
  }

 private:
  // Empty for what is left to Python, an output that took no part among it.
  static variable_list fused(const variable_list& dys, const variable_list& saved, const c10::List<double>& numbers,
                             const bool* needs, PyObject* packed) {
    if (at::GradMode::is_enabled() || !nobody_watches()) return {};
    Incomings each;
    for (std::size_t i = 0; i < dys.size(); ++i) {
      const Tensor* own = &saved[1 + 5 * i];
      if (!dys[i].defined()) return {};
      const Tensor weight = !needs[0] ? Tensor() : packed ? dense(packed) : own[0];
      each.push_back({dys[i], needs[1 + 3 * i] ? saved[0] : Tensor(), weight, own[1], own[2], own[3], own[4],
                      numbers.get(2 + 2 * i), numbers.get(1), needs[2 + 3 * i]});
      if (!fits(each[i]) || dys[i].sizes().slice(0, dys[i].dim() - 1) != dys[0].sizes().slice(0, dys[0].dim() - 1))
        return {};
    }
    const MaybePlan plan = ::plan(static_cast<int>(numbers.get(0)), each);
    if (!plan) return {};
    auto made = ::backward(*plan, each);
    variable_list g(1 + 3 * dys.size());
    if (needs[0]) g[0] = shaped(made[0].dx, dys[0]);
    for (std::size_t i = 0; i < dys.size(); ++i) {
      g[1 + 3 * i] = std::move(made[i].dA);
      g[2 + 3 * i] = std::move(made[i].dB);
      if (needs[3 + 3 * i]) g[3 + 3 * i] = fastlora::rows_of(dys[i]).sum(0);
    }
    return g;
  }

  static variable_list in_python(const variable_list& dys, const variable_list& saved, const c10::List<double>& numbers,
                                 const bool* needs, PyObject* packed) {
    HoldsGIL gil;
    const std::size_t n = dys.size();
    const auto tuple = [](std::size_t count, const auto& of) {
      Owned made(PyTuple_New(count));
      for (std::size_t i = 0; made && i < count; ++i) PyTuple_SET_ITEM(made.get(), i, of(i));
      return made;
    };
    const auto kept = [&](std::size_t part) {
      return tuple(n, [&](std::size_t i) { return wrapped(saved[1 + 5 * i + part]).release(); });
    };
    const Owned given = tuple(n, [&](std::size_t i) { return wrapped(dys[i]).release(); }), x = wrapped(saved[0]);
    const Owned weights = packed ? tuple(1, [&](std::size_t) { return Py_NewRef(packed); }) : kept(0);
    const Owned As = kept(1), Bs = kept(2), Ss = kept(3), seeds = kept(4);
    const Owned scalings = tuple(n, [&](std::size_t i) { return PyFloat_FromDouble(numbers.get(2 + 2 * i)); });
    const Owned needed = tuple(1 + 3 * n, [&](std::size_t i) { return PyBool_FromLong(needs[i]); });
    const Owned found(PyObject_CallFunction(python_gradients, "OOOOOOOOdOO", given.get(), x.get(), weights.get(),
                                            As.get(), Bs.get(), Ss.get(), seeds.get(), scalings.get(), numbers.get(1),
                                            paths[static_cast<std::size_t>(numbers.get(0))], needed.get()));
    return unwrapped(found);
  }
};

bool number(PyObject* object, double& value) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  value = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an integer that no double holds
  return false;
}

// One more projection of x, of (weight, lora_A, lora_B, bias, scaling), if they are of the exact types.
bool add(Layers& each, PyObject* x, PyObject* const* parts, PyObject* p, PyObject* packed = Py_None) {
  double scaling, dropout_p;
  for (PyObject* t : {x, parts[0], parts[1], parts[2]})
    if (!THPVariable_CheckExact(t)) return false;
  if (parts[3] != Py_None && !THPVariable_CheckExact(parts[3])) return false;
  if (!number(parts[4], scaling) || !number(p, dropout_p)) return false;
  each.push_back({THPVariable_Unpack(x), THPVariable_Unpack(parts[0]), THPVariable_Unpack(parts[1]),
                  THPVariable_Unpack(parts[2]), parts[3] == Py_None ? Tensor() : THPVariable_Unpack(parts[3]), Tensor(),
                  scaling, dropout_p, packed == Py_None ? nullptr : packed});
  return true;
}

// The same of a sequence of them.
bool add_all(Layers& each, PyObject* x, PyObject* projections, PyObject* p) {
  const Owned sequence(PySequence_Tuple(projections));
  if (!sequence) return PyErr_Clear(), false;
  const std::size_t count = PyTuple_GET_SIZE(sequence.get());
  if (count < 1 || count > MOST) return false;
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* one = PyTuple_GET_ITEM(sequence.get(), i);
    if (!(PyTuple_CheckExact(one) || PyList_CheckExact(one)) || PySequence_Fast_GET_SIZE(one) != 5) return false;
    if (!add(each, x, PySequence_Fast_ITEMS(one), p)) return false;
  }
  return true;
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

// A path with tiles of its own (Path.with_tiles) is met here for the first time.
int path_of(PyObject* object) {
  for (std::size_t i = 0; i < paths.size(); ++i)
    if (paths[i] == object) return static_cast<int>(i);
  paths.push_back(Py_NewRef(object));
  return static_cast<int>(paths.size() - 1);
}

// y of each by `path`, or by the chosen one where that is None; empty for what is left to Python.
variable_list call(PyObject* path, Layers& each) {
  if (!nobody_watches()) return {};
  const bool learn = learns(each[0]);  // as all must: one node makes one thing of them
  for (const Layer& one : each)
    if (!fits(one) || one.weight.requires_grad() || learns(one) != learn) return {};
  if (each[0].packed && compiles_backward()) return {};
  const MaybePlan plan = path == Py_None ? chosen_plan(choice_key(each), each) : ::plan(path_of(path), each);
  if (!plan) return {};
  ReleasesGIL no_gil;
  draw_seeds(each, *plan);
  if (learn && at::GradMode::is_enabled()) {
    c10::SmallVector<Tensor, 3> trained;
    for (const Layer& one : each)
      for (const Tensor* t : {&one.lora_A, &one.lora_B, &one.bias})
        if (t->defined()) trained.push_back(*t);
    return LoRALinears::apply(each[0].x, at::TensorList(trained), each, *plan);
  }
  variable_list ys;
  for (fastlora::Result& result : forward(*plan, each)) ys.push_back(std::move(result.y));
  return ys;
}

// ---- the ops, for compilers: fastlora/ops.py gives them fakes and gradients ----

std::tuple<Tensor, Tensor> op_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                      const Optional& bias, double scaling, double p, const Optional& seed,
                                      c10::string_view path) {
  const Layers one{{x, weight, lora_A, lora_B, bias.value_or(Tensor()), seed.value_or(Tensor()), scaling, p}};
  const Layer& layer = one[0];
  if (path.empty() && nobody_watches() && fits(layer) && is_seed(layer.seed, p, x.device())) {
    if (const MaybePlan plan = chosen_plan(choice_key(one), one)) {
      fastlora::Result made = std::move(forward(*plan, one)[0]);
      return {std::move(made.y), std::move(made.S)};
    }
  }
  HoldsGIL gil;
  const Owned held[] = {wrapped(x), wrapped(weight), wrapped(lora_A), wrapped(lora_B), wrapped(layer.bias),
                        wrapped(layer.seed)};
  const auto found = unwrapped(Owned(PyObject_CallFunction(
      python_forward, "OOOOOddOs#", held[0].get(), held[1].get(), held[2].get(), held[3].get(), held[4].get(), scaling,
      p, held[5].get(), path.data(), static_cast<Py_ssize_t>(path.size()))));
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor, Tensor> op_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                               const Tensor& lora_A, const Tensor& lora_B, const Tensor& S,
                                               double scaling, double p, const Optional& seed, c10::string_view path,
                                               bool need_x, bool need_A, bool need_B) {
  const Incomings one{{dy, need_A ? x : Tensor(), need_x ? weight : Tensor(), lora_A, lora_B, S, seed.value_or(Tensor()),
                       scaling, p, need_B}};
  if (path.empty() && nobody_watches() && fits(one[0]) && x.dim() > 0 && weight.dim() == 2) {
    if (const MaybePlan plan = chosen_plan(fastlora::choice_key(x, weight, lora_A, p > 0.0), one)) {
      const Gradients found = backward(*plan, one)[0];
      return {need_x ? found.dx.view(x.sizes()) : at::empty({0}, x.options()),
              need_A ? found.dA : at::empty({0}, lora_A.options()),
              need_B ? found.dB : at::empty({0}, lora_B.options())};
    }
  }
  HoldsGIL gil;
  const Owned held[] = {wrapped(dy), wrapped(x), wrapped(weight), wrapped(lora_A), wrapped(lora_B), wrapped(S),
                        wrapped(one[0].seed)};
  const auto found = unwrapped(Owned(PyObject_CallFunction(
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

// ---- the module ----

// lora_linear(path, x, weight, lora_A, lora_B, bias, scaling, p[, what the weight was dequantised from]): y by this path,
// or by the chosen one for None; None: left to Python
PyObject* lora_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 8 && count != 9) return PyErr_Format(PyExc_TypeError, "8 or 9 arguments needed, got %zd", count);
  Layers one;
  if (!add(one, values[1], values + 2, values[7], count == 9 ? values[8] : Py_None)) Py_RETURN_NONE;
  const variable_list ys = call(values[0], one);
  if (ys.empty()) Py_RETURN_NONE;
  return THPVariable_Wrap(ys[0]);
  END_HANDLE_TH_ERRORS
}

// lora_linears(path, x, projections, p): the same of several
PyObject* lora_linears(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return PyErr_Format(PyExc_TypeError, "4 arguments needed, got %zd", count);
  Layers each;
  if (!add_all(each, values[1], values[2], values[3])) Py_RETURN_NONE;
  const variable_list ys = call(values[0], each);
  if (ys.empty()) Py_RETURN_NONE;
  Owned made(PyTuple_New(ys.size()));
  for (std::size_t i = 0; made && i < ys.size(); ++i) PyTuple_SET_ITEM(made.get(), i, THPVariable_Wrap(ys[i]));
  return made.release();
  END_HANDLE_TH_ERRORS
}

// prepare(kernels or None, gradients, paths, the place of `cpu` among them): once, before anything else
PyObject* prepare(PyObject*, PyObject* arguments) {
  PyObject *capsule, *gradients, *all;
  if (!PyArg_ParseTuple(arguments, "OOO!i", &capsule, &gradients, &PyTuple_Type, &all, &path_cpu)) return nullptr;
  if (capsule != Py_None) {
    const void* table = PyCapsule_GetPointer(capsule, fastlora::KERNELS);
    if (!table) return nullptr;
    fastlora::cpu::kernels = static_cast<const fastlora::Kernels*>(table);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(all); ++i) paths.push_back(Py_NewRef(PyTuple_GET_ITEM(all, i)));
  python_gradients = Py_NewRef(gradients);
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

// choose_shared(path, x, projections, p)
PyObject* choose_shared(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return PyErr_Format(PyExc_TypeError, "4 arguments needed, got %zd", count);
  Layers each;
  const auto fitting = [](const Layer& one) { return fits(one); };
  if (add_all(each, values[1], values[2], values[3]) && std::all_of(each.begin(), each.end(), fitting))
    fastlora::chosen.insert(choice_key(each), path_of(values[0]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  fastlora::chosen.clear();
  fastlora::records.clear();
  fastlora::met.clear();
  Py_RETURN_NONE;
}

// One direction of a call, as fastlora/node.py hands it over: tensors are x, then forward's five or backward's six of each
// projection, in the order of a record's inputs; wanted is None forward, backward (dx, each dA, each dB).
struct Given {
  PyObject *path, *tensors, *scalings, *wanted, *record = nullptr;  // wanted may hold what is as good as True
  double p;

  bool parsed(PyObject* arguments) {
    return PyArg_ParseTuple(arguments, "OO!O!dO|O", &path, &PyTuple_Type, &tensors, &PyTuple_Type, &scalings, &p,
                            &wanted, &record);
  }
  bool backward() const { return wanted != Py_None; }
  // what tells its device and dtype: x, or the first dy
  const Tensor& first() const { return THPVariable_Unpack(PyTuple_GET_ITEM(tensors, backward() ? 1 : 0)); }

  // nothing where no record could serve it
  std::optional<fastlora::Key> key() const {
    const int place = path_of(path);
    const std::size_t n = PyTuple_GET_SIZE(scalings), step = backward() ? 6 : 5;
    if (place == path_cpu || n < 1 || n > MOST || static_cast<std::size_t>(PyTuple_GET_SIZE(tensors)) != 1 + step * n)
      return std::nullopt;
    std::array<Tensor, 1 + 6 * MOST> t;
    for (std::size_t i = 0; i < 1 + step * n; ++i) {
      PyObject* one = PyTuple_GET_ITEM(tensors, i);
      if (one == Py_None) continue;
      if (!THPVariable_CheckExact(one)) return std::nullopt;
      t[i] = THPVariable_Unpack(one);
    }
    const Tensor& first = t[backward() ? 1 : 0];
    if (!first.defined() || !is_plain(first) || !recordable(first, p) || !stream_for(first).known) return std::nullopt;
    Layers layers;
    Incomings incoming;
    for (std::size_t i = 0; i < n; ++i) {
      const Tensor* own = &t[1 + step * i];
      const double scaling = PyFloat_AsDouble(PyTuple_GET_ITEM(scalings, i));
      if (backward()) {
        const bool A = PyObject_IsTrue(PyTuple_GET_ITEM(wanted, 1 + i)) == 1;
        const bool B = PyObject_IsTrue(PyTuple_GET_ITEM(wanted, 1 + n + i)) == 1;
        incoming.push_back({own[0], A ? t[0] : Tensor(), own[1], own[2], own[3], own[4], own[5], scaling, p, B});
        if (!fits(incoming[i])) return std::nullopt;
      } else {
        layers.push_back({t[0], own[0], own[1], own[2], own[3], own[4], scaling, p});
        if (!fits(layers[i]) || !is_seed(own[4], p, t[0].device())) return std::nullopt;
      }
    }
    return backward() ? record_key(place, incoming) : record_key(place, layers);
  }
};

// lacks(path, tensors, scalings, p, wanted): whether a record of this call would be of use
PyObject* lacks(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  Given given;
  if (!given.parsed(arguments)) return nullptr;
  return PyBool_FromLong(fastlora::lacks(given.key(), given.first().is_cuda()));
  END_HANDLE_TH_ERRORS
}

// keep(path, tensors, scalings, p, wanted, record or None)
PyObject* keep(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  Given given;
  if (!given.parsed(arguments)) return nullptr;
  const auto key = given.key();
  if (!key) Py_RETURN_NONE;
  std::shared_ptr<const fastlora::Record> record;
  if (given.record != Py_None) {
    record = fastlora::Record::parse(given.record, given.first());
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
    {"lora_linear", fastcall<lora_linear>(), METH_FASTCALL, "y by a path, or by the chosen one; None: left to Python"},
    {"lora_linears", fastcall<lora_linears>(), METH_FASTCALL, "y of projections that share x; None: left to Python"},
    {"prepare", prepare, METH_VARARGS, "hand over the kernels, the paths, and what is left to Python"},
    {"serve", serve, METH_VARARGS, "hand over what the ops leave to Python"},
    {"choose", choose, METH_VARARGS, "say for which calls a path was chosen"},
    {"choose_shared", fastcall<choose_shared>(), METH_FASTCALL, "say for which projections a path was chosen"},
    {"forget", forget, METH_NOARGS, "take back all that was chosen and recorded"},
    {"lacks", lacks, METH_VARARGS, "whether a record of this call would be of use"},
    {"keep", keep, METH_VARARGS, "hand over the record of a call, or None: there is none"},
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
