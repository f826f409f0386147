// Projections that share x as one node: what fastlora/shared.py and shared_autograd.py do. Part of node.cpp, whose gate,
// plans and Python stand above it; each projection is a Layer or an Incoming of its own there.

#pragma once

namespace {

constexpr std::size_t MOST = 4;  // projections of a node, as in fastlora/shared.py

// What is no tensor, for backward; kept as bytes, which compilers of backward can compare.
struct Numbers {
  int64_t path = 0, count = 0, biases = 0;  // bit i: projection i has one
  double p = 0.0, scaling[MOST] = {};

  c10::List<double> kept() const {  // what compiled autograd can look into
    return {double(path), double(count), double(biases), p, scaling[0], scaling[1], scaling[2], scaling[3]};
  }
  static Numbers of(const at::IValue& value) {
    static_assert(MOST == 4);
    const c10::List<double> n = value.toDoubleList();
    return {int64_t(n.get(0)), int64_t(n.get(1)), int64_t(n.get(2)), n.get(3), {n.get(4), n.get(5), n.get(6), n.get(7)}};
  }
};

struct Shared {
  Tensor x;
  std::vector<Layer> each;  // of this x
  std::vector<Tensor> weight, A, B;
  std::vector<Optional> bias;
  double p = 0.0;

  std::size_t size() const { return each.size(); }
};

// The layers of (x, ((weight, lora_A, lora_B, bias, scaling), ...), p); false where one of them is out of the ordinary.
bool parsed(PyObject* x, PyObject* projections, PyObject* p, Shared& shared) {
  if (!THPVariable_CheckExact(x) || !PyFloat_Check(p)) return false;
  const Owned sequence(PySequence_Tuple(projections));
  if (!sequence) return PyErr_Clear(), false;
  const std::size_t count = PyTuple_GET_SIZE(sequence.get());
  if (count < 2 || count > MOST) return false;
  shared.x = THPVariable_Unpack(x);
  shared.p = PyFloat_AS_DOUBLE(p);
  for (auto* part : {&shared.weight, &shared.A, &shared.B}) part->reserve(count);
  shared.bias.reserve(count);  // layers refer to what these hold
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* one = PyTuple_GET_ITEM(sequence.get(), i);
    if (!(PyTuple_CheckExact(one) || PyList_CheckExact(one)) || PySequence_Fast_GET_SIZE(one) != 5) return false;
    PyObject** parts = PySequence_Fast_ITEMS(one);
    PyObject *w = parts[0], *A = parts[1], *B = parts[2], *bias = parts[3];
    const bool plain = THPVariable_CheckExact(w) && THPVariable_CheckExact(A) && THPVariable_CheckExact(B) &&
                       (bias == Py_None || THPVariable_CheckExact(bias)) &&
                       (PyFloat_Check(parts[4]) || PyLong_Check(parts[4]));
    const double scaling = plain ? PyFloat_AsDouble(parts[4]) : 0.0;
    if (PyErr_Occurred()) return PyErr_Clear(), false;  // an integer that no double holds
    if (!plain) return false;
    shared.weight.push_back(THPVariable_Unpack(w));
    shared.A.push_back(THPVariable_Unpack(A));
    shared.B.push_back(THPVariable_Unpack(B));
    shared.bias.push_back(bias == Py_None ? std::nullopt : Optional(THPVariable_Unpack(bias)));
    shared.each.push_back({shared.x, shared.weight[i], shared.A[i], shared.B[i], shared.bias[i], scaling, shared.p,
                           Tensor()});
    if (!fits(shared.each[i]) || shared.weight[i].requires_grad()) return false;
  }
  return true;
}

// Of what is asked for too: backward has kernels of its own for it, which are admitted by themselves.
fastlora::Key choice_key(const Shared& shared) {
  fastlora::Key key;
  key.add(int64_t{shared.x.requires_grad()});
  for (const Layer& one : shared.each) {
    key.add(fastlora::choice_key(one.x, one.weight, one.lora_A, one.p > 0.0));
    key.add(int64_t{one.lora_A.requires_grad()} << 1 | one.lora_B.requires_grad());
  }
  return key;
}

fastlora::Key record_key(int path, const Shared& shared) {
  fastlora::Key key;
  for (const Layer& one : shared.each) key.add(fastlora::record_key(path, one));
  return key;
}

fastlora::Key record_key(int path, const std::vector<Incoming>& each) {
  fastlora::Key key;
  for (const Incoming& in : each) {
    key.add(fastlora::record_key(path, in));
    key.add(int64_t{in.x.defined()} << 1 | in.weight.defined());
  }
  return key;
}

// fastlora.paths.problem.draw_seeds: on a GPU the columns of one draw, views made without the dispatcher.
void draw_seeds(Shared& shared, const Plan& plan) {
  if (!(shared.p > 0.0)) return;
  if (shared.x.is_cpu()) {
    for (Layer& one : shared.each) one.seed = draw_seed(shared.p, shared.x.device(), plan);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const Tensor all = drawn({static_cast<int64_t>(shared.size()), 2}, shared.x.device(), plan);
  for (std::size_t i = 0; i < shared.size(); ++i) {
    shared.each[i].seed = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(all.storage()), all.key_set(), all.dtype());
    shared.each[i].seed.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(), at::IntArrayRef(), static_cast<int64_t>(2 * i));
  }
}

// Who computes them: path `cpu`, or a record.
template <typename Calls, typename KeyOf>
MaybePlan plan_together(int path, const Tensor& t, const Calls& each, const KeyOf& key) {
  if (path == path_cpu) {
    for (const auto& one : each)
      if (!::plan(path, one)) return std::nullopt;
    return MaybePlan({path, nullptr, nullptr});
  }
  return plan_of_record(path, t, each[0].p, key);
}

std::vector<Result> forward(const Plan& plan, const Shared& shared) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  std::vector<Result> made;
  made.reserve(shared.size());
  if (!plan.record) {
    for (const Layer& one : shared.each) made.push_back(fastlora::cpu::forward(one));
    return made;
  }
  const Tensor none;
  const Tensor* inputs[1 + 5 * MOST] = {&shared.x};
  std::size_t count = 1;
  for (const Layer& one : shared.each)
    for (const Tensor* t : {&one.weight, &one.lora_A, &one.lora_B, one.bias ? &*one.bias : &none, &one.seed})
      inputs[count++] = t;
  Tensor outputs[2 * MOST];
  plan.record->run(inputs, count, outputs, plan.stream);
  for (std::size_t i = 0; i < shared.size(); ++i)
    made.push_back({std::move(outputs[i]), std::move(outputs[shared.size() + i])});
  return made;
}

// dx, which is the first one's, and dA and dB of each.
std::vector<Gradients> backward(const Plan& plan, const std::vector<Incoming>& each) {
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  std::vector<Gradients> found(each.size());
  if (!plan.record) {
    Tensor dx;
    for (std::size_t i = 0; i < each.size(); ++i) {
      found[i] = fastlora::cpu::backward(each[i], dx);
      dx = found[i].dx;
    }
    found[0].dx = dx;
    return found;
  }
  Tensor x, outputs[1 + 2 * MOST];
  for (const Incoming& in : each)
    if (in.x.defined()) x = in.x;
  const Tensor* inputs[1 + 6 * MOST] = {&x};
  std::size_t count = 1, next = 0;
  for (const Incoming& in : each)
    for (const Tensor* t : {&in.dy, &in.weight, &in.lora_A, &in.lora_B, &in.S, &in.seed}) inputs[count++] = t;
  plan.record->run(inputs, count, outputs, plan.stream);
  if (each[0].weight.defined()) found[0].dx = std::move(outputs[next++]);
  for (std::size_t i = 0; i < each.size(); ++i)
    if (each[i].x.defined()) found[i].dA = as(each[i].lora_A, outputs[next++]);
  for (std::size_t i = 0; i < each.size(); ++i)
    if (each[i].need_B) found[i].dB = as(each[i].lora_B, outputs[next++]);
  return found;
}

variable_list backward_in_python(const variable_list& dys, const variable_list& saved, const Numbers& numbers,
                                 const std::vector<char>& needs) {
  HoldsGIL gil;
  const std::size_t n = numbers.count;
  const auto tuple = [](const auto& tensors, std::size_t from, std::size_t count) {
    Owned made(PyTuple_New(count));
    for (std::size_t i = 0; made && i < count; ++i)
      PyTuple_SET_ITEM(made.get(), i, wrapped(tensors[from + i]).release());
    return made;
  };
  const Owned scalings(PyTuple_New(n)), needed(PyTuple_New(needs.size())), given = tuple(dys, 0, n);
  for (std::size_t i = 0; scalings && i < n; ++i)
    PyTuple_SET_ITEM(scalings.get(), i, PyFloat_FromDouble(numbers.scaling[i]));
  for (std::size_t i = 0; needed && i < needs.size(); ++i)
    PyTuple_SET_ITEM(needed.get(), i, PyBool_FromLong(needs[i]));
  const Owned x = wrapped(saved[0]), weights = tuple(saved, 1, n), As = tuple(saved, 1 + n, n),
              Bs = tuple(saved, 1 + 2 * n, n), Ss = tuple(saved, 1 + 3 * n, n), seeds = tuple(saved, 1 + 4 * n, n);
  const Owned found(PyObject_CallFunction(python_shared_gradients, "OOOOOOOOdOO", given.get(), x.get(), weights.get(),
                                          As.get(), Bs.get(), Ss.get(), seeds.get(), scalings.get(), numbers.p,
                                          paths[numbers.path], needed.get()));
  if (!found) raise();
  const Owned list(PySequence_Tuple(found.get()));
  if (!list) raise();
  variable_list all(PyTuple_GET_SIZE(list.get()));
  for (std::size_t i = 0; i < all.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(list.get(), i);
    if (one != Py_None) all[i] = THPVariable_Unpack(one);
  }
  return all;
}

struct LoRALinears : torch::autograd::Function<LoRALinears> {
  // `trained`: lora_A and lora_B of each, then the biases that there are.
  static variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x, at::TensorList trained,
                               const Shared& shared, const Plan& plan) {
    std::vector<Result> made = ::forward(plan, shared);
    const std::size_t n = shared.size();
    const auto learns = [](const Tensor& t) { return t.requires_grad(); };
    const bool any_A = std::any_of(shared.A.begin(), shared.A.end(), learns);
    const bool any_B = std::any_of(shared.B.begin(), shared.B.end(), learns);
    Numbers numbers;
    numbers.path = plan.path;
    numbers.count = static_cast<int64_t>(n);
    numbers.p = shared.p;
    variable_list saved(1 + 5 * n), ys(n);
    saved[0] = any_A ? x : x.requires_grad() && any_B ? shadow(x) : Tensor();
    for (std::size_t i = 0; i < n; ++i) {
      const Layer& one = shared.each[i];
      if (x.requires_grad()) saved[1 + i] = one.weight;
      saved[1 + n + i] = one.lora_A;
      saved[1 + 2 * n + i] = one.lora_B;
      saved[1 + 3 * n + i] = std::move(made[i].S);
      saved[1 + 4 * n + i] = one.seed;
      ys[i] = std::move(made[i].y);
      numbers.scaling[i] = one.scaling;
      numbers.biases |= int64_t{one.bias.has_value()} << i;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = numbers.kept();
    ctx->set_materialize_grads(false);
    return ys;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& dys) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const Numbers numbers = Numbers::of(ctx->saved_data["call"]);
    const std::size_t n = numbers.count;
    // as Python has them: x, then lora_A, lora_B and bias of each
    std::vector<char> needs(1 + 3 * n);
    needs[0] = ctx->needs_input_grad(0);
    std::size_t biases = 0;
    for (std::size_t i = 0; i < n; ++i) {
      needs[1 + 3 * i] = ctx->needs_input_grad(1 + 2 * i);
      needs[2 + 3 * i] = ctx->needs_input_grad(2 + 2 * i);
      if (numbers.biases >> i & 1) needs[3 + 3 * i] = ctx->needs_input_grad(1 + 2 * n + biases++);
    }
    variable_list g = together(dys, saved, numbers, needs);
    if (g.empty()) g = backward_in_python(dys, saved, numbers, needs);
    variable_list ordered{std::move(g[0])};
    ordered.reserve(3 + 2 * n + biases);
    for (std::size_t i = 0; i < n; ++i) {
      ordered.push_back(std::move(g[1 + 3 * i]));
      ordered.push_back(std::move(g[2 + 3 * i]));
    }
    for (std::size_t i = 0; i < n; ++i)
      if (numbers.biases >> i & 1) ordered.push_back(std::move(g[3 + 3 * i]));
    ordered.resize(ordered.size() + 2);  // of what is no tensor
    return ordered;
  }

 private:
  // Empty for what is left to Python, an output that took no part among it.
  static variable_list together(const variable_list& dys, const variable_list& saved, const Numbers& numbers,
                                const std::vector<char>& needs) {
    if (at::GradMode::is_enabled() || !nobody_watches()) return {};
    const std::size_t n = numbers.count;
    std::vector<Incoming> each;
    each.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      if (!dys[i].defined()) return {};
      each.push_back({dys[i], needs[1 + 3 * i] ? saved[0] : Tensor(), needs[0] ? saved[1 + i] : Tensor(),
                      saved[1 + n + i], saved[1 + 2 * n + i], saved[1 + 3 * n + i], saved[1 + 4 * n + i],
                      numbers.scaling[i], numbers.p, static_cast<bool>(needs[2 + 3 * i])});
      if (!fits(each[i]) || dys[i].sizes().slice(0, dys[i].dim() - 1) != dys[0].sizes().slice(0, dys[0].dim() - 1))
        return {};
    }
    const int path = static_cast<int>(numbers.path);
    const MaybePlan plan = plan_together(path, dys[0], each, [&] { return record_key(path, each); });
    if (!plan) return {};
    std::vector<Gradients> found = ::backward(*plan, each);
    variable_list g(needs.size());
    if (needs[0]) g[0] = shaped(found[0].dx, dys[0]);
    for (std::size_t i = 0; i < n; ++i) {
      if (needs[1 + 3 * i]) g[1 + 3 * i] = std::move(found[i].dA);
      if (needs[2 + 3 * i]) g[2 + 3 * i] = std::move(found[i].dB);
      if (needs[3 + 3 * i]) g[3 + 3 * i] = fastlora::rows_of(dys[i]).sum(0);
    }
    return g;
  }
};

bool learns(const Layer& one) {
  return one.x.requires_grad() || one.lora_A.requires_grad() || one.lora_B.requires_grad() ||
         (one.bias && one.bias->requires_grad());
}

// (y, ...), or None for what is left to Python; `path` is negative for the chosen one.
PyObject* call_shared(int path, PyObject* x, PyObject* projections, PyObject* p) {
  Shared shared;
  if (!parsed(x, projections, p, shared) || !nobody_watches()) Py_RETURN_NONE;
  const bool learn = learns(shared.each[0]);  // as all must: one node makes one thing of them
  for (const Layer& one : shared.each)
    if (learns(one) != learn) Py_RETURN_NONE;
  if (path < 0) {
    if (const auto chosen = fastlora::chosen.find(choice_key(shared)))
      path = *chosen;
    else
      Py_RETURN_NONE;
    if (!stream_for(shared.x).known) Py_RETURN_NONE;
  }
  const MaybePlan plan = plan_together(path, shared.x, shared.each, [&] { return record_key(path, shared); });
  if (!plan || is_captured(*plan, shared.x)) Py_RETURN_NONE;
  variable_list ys, trained;
  {
    ReleasesGIL no_gil;
    draw_seeds(shared, *plan);
    for (const Layer& one : shared.each) {
      trained.push_back(one.lora_A);
      trained.push_back(one.lora_B);
    }
    for (const Layer& one : shared.each)
      if (one.bias) trained.push_back(*one.bias);
    if (learn && at::GradMode::is_enabled()) {
      ys = LoRALinears::apply(shared.x, at::TensorList(trained), shared, *plan);
    } else {
      for (Result& result : forward(*plan, shared)) ys.push_back(std::move(result.y));
    }
  }
  Owned made(PyTuple_New(ys.size()));
  for (std::size_t i = 0; made && i < ys.size(); ++i) PyTuple_SET_ITEM(made.get(), i, THPVariable_Wrap(ys[i]));
  return made.release();
}

// lora_linears(x, projections, p): y of each by the path that was chosen; None: left to Python
PyObject* lora_linears(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3) return PyErr_Format(PyExc_TypeError, "3 arguments needed, got %zd", count);
  return call_shared(-1, values[0], values[1], values[2]);
  END_HANDLE_TH_ERRORS
}

// run_shared(path, x, projections, p): y of each by the path given; None: left to Python
PyObject* run_shared(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return PyErr_Format(PyExc_TypeError, "4 arguments needed, got %zd", count);
  return call_shared(path_of(values[0]), values[1], values[2], values[3]);
  END_HANDLE_TH_ERRORS
}

// choose_shared(path, x, projections, p)
PyObject* choose_shared(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4) return PyErr_Format(PyExc_TypeError, "4 arguments needed, got %zd", count);
  Shared shared;
  if (parsed(values[1], values[2], values[3], shared)) fastlora::chosen.insert(choice_key(shared), path_of(values[0]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// The key of (path, tensors, scalings, p, wanted): tensors are x, then forward's five or backward's six of each, in the
// order of a record's inputs; wanted is None forward, backward (dx, each dA, each dB). None: no record could serve them.
std::optional<fastlora::Key> shared_key_of(PyObject* path_object, PyObject* tensors, PyObject* scalings, double p,
                                           PyObject* wanted) {
  const int path = path_of(path_object);
  const std::size_t n = PyTuple_GET_SIZE(scalings), step = wanted == Py_None ? 5 : 6;
  if (path < 0 || path == path_cpu || n < 2 || n > MOST ||
      static_cast<std::size_t>(PyTuple_GET_SIZE(tensors)) != 1 + step * n)
    return std::nullopt;
  std::vector<Tensor> t(1 + step * n);
  for (std::size_t i = 0; i < t.size(); ++i) {
    PyObject* one = PyTuple_GET_ITEM(tensors, i);
    if (one == Py_None) continue;
    if (!THPVariable_CheckExact(one)) return std::nullopt;
    t[i] = THPVariable_Unpack(one);
  }
  const Tensor& first = wanted == Py_None ? t[0] : t[1];
  if (!first.defined() || !is_plain(first) || !recordable(first, p) || !stream_for(first).known) return std::nullopt;
  std::vector<Incoming> incoming;
  Shared shared;
  incoming.reserve(n);
  shared.bias.reserve(n);
  for (std::size_t i = 0; i < n; ++i) {
    const Tensor* own = &t[1 + step * i];
    const double scaling = PyFloat_AsDouble(PyTuple_GET_ITEM(scalings, i));
    if (wanted == Py_None) {
      shared.bias.push_back(own[3].defined() ? Optional(own[3]) : std::nullopt);
      shared.each.push_back({t[0], own[0], own[1], own[2], shared.bias[i], scaling, p, own[4]});
      if (!fits(shared.each[i]) || !is_seed(own[4], p, t[0].device())) return std::nullopt;
    } else {
      const bool A = PyTuple_GET_ITEM(wanted, 1 + i) == Py_True, B = PyTuple_GET_ITEM(wanted, 1 + n + i) == Py_True;
      incoming.push_back({own[0], A ? t[0] : Tensor(), own[1], own[2], own[3], own[4], own[5], scaling, p, B});
      if (!fits(incoming[i])) return std::nullopt;
    }
  }
  return wanted == Py_None ? record_key(path, shared) : record_key(path, incoming);
}

// lacks_shared(path, tensors, scalings, p, wanted): whether a record of this call would be of use
PyObject* lacks_shared(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *path, *tensors, *scalings, *wanted;
  double p;
  if (!PyArg_ParseTuple(arguments, "OO!O!dO", &path, &PyTuple_Type, &tensors, &PyTuple_Type, &scalings, &p, &wanted))
    return nullptr;
  return PyBool_FromLong(fastlora::lacks(shared_key_of(path, tensors, scalings, p, wanted), is_cuda(tensors, 1)));
  END_HANDLE_TH_ERRORS
}

// keep_shared(path, tensors, scalings, p, wanted, record or None)
PyObject* keep_shared(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *path, *tensors, *scalings, *wanted, *object;
  double p;
  if (!PyArg_ParseTuple(arguments, "OO!O!dOO", &path, &PyTuple_Type, &tensors, &PyTuple_Type, &scalings, &p, &wanted,
                        &object))
    return nullptr;
  const auto key = shared_key_of(path, tensors, scalings, p, wanted);
  if (!key) Py_RETURN_NONE;
  std::shared_ptr<const fastlora::Record> record;
  if (object != Py_None) {
    record = fastlora::Record::parse(object, THPVariable_Unpack(PyTuple_GET_ITEM(tensors, 1)));
    if (!record) return nullptr;
  }
  fastlora::records.insert(*key, record);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace
