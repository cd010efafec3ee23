// Calls that take part in autograd: included by _native.cpp alone.

#pragma once

#include "_native_replay.h"

namespace {

using NodePointer = decltype(torch::autograd::Edge().function);  // shared up to torch 2.11, intrusive since

struct Gradient : torch::autograd::Node {
  std::string label;
  PyObject *gradients, *how;
  int parameters;
  std::vector<int> places;  // of the tensors among the parameters, in the order of the edges
  std::vector<torch::autograd::SavedVariable> saved;
  std::vector<bool> integer;  // by output: it has no gradient

  Gradient(const Autograd& of, PyObject* how_, int n, torch::autograd::edge_list&& edges, std::vector<int> places_)
      : Node(std::move(edges)), label(of.name), gradients(Py_NewRef(of.gradients)), how(how_), parameters(n),
        places(std::move(places_)) {}

  ~Gradient() override {
    if (!Py_IsInitialized()) return;
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(gradients);
    Py_DECREF(how);
    PyGILState_Release(gil);
  }

  std::string name() const override { return label; }
  void release_variables() override {
    for (auto& s : saved) s.reset_data();
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    std::vector<at::Tensor> tensors;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].defined() || integer[i])
        tensors.push_back(std::move(grads[i]));
      else
        tensors.push_back(input_metadata(i).zeros_like());
    }
    for (auto& s : saved) tensors.push_back(s.unpack(getptr()));
    torch::autograd::variable_list found(places.size());
    PyGILState_STATE gil = PyGILState_Ensure();
    bool fine = c10::GradMode::is_enabled() ? refuse() : call(tensors, found);
    if (!fine) {
      python_error e;
      e.persist();
      PyGILState_Release(gil);
      throw e;
    }
    PyGILState_Release(gil);
    return found;
  }

 private:
  bool refuse() {
    PyObject* r = PyObject_CallFunction(state.refuse, "s", label.c_str());
    Py_XDECREF(r);
    return false;
  }

  bool call(std::vector<at::Tensor>& tensors, torch::autograd::variable_list& found) {
    PyObject* needs = PyTuple_New(parameters);
    if (!needs) return false;
    for (int i = 0; i < parameters; ++i) PyTuple_SET_ITEM(needs, i, Py_NewRef(Py_False));
    for (size_t e = 0; e < places.size(); ++e)
      if (task_should_compute_output(e)) PyTuple_SetItem(needs, places[e], Py_NewRef(Py_True));
    std::vector<PyObject*> args{how, needs};
    for (auto& t : tensors) args.push_back(THPVariable_Wrap(std::move(t)));
    PyObject* result = PyObject_Vectorcall(gradients, args.data(), args.size(), nullptr);
    for (size_t i = 1; i < args.size(); ++i) Py_DECREF(args[i]);
    if (!result) return false;
    for (size_t e = 0; e < places.size(); ++e) {
      PyObject* g = PyTuple_GET_ITEM(result, places[e]);
      if (g != Py_None) found[e] = THPVariable_Unpack(g);
    }
    Py_DECREF(result);
    return true;
  }
};

template <typename P>
P make_node(Gradient* node) {
  if constexpr (std::is_same_v<P, std::shared_ptr<torch::autograd::Node>>)
    // Found by its argument's namespace: torch 2.12 has no such function. It takes deep graphs apart without recursion.
    return P(node, [](auto* n) { deleteNode(n); });
  else
    return P::unsafe_steal_from_new(node);
}

// `how` with the numbers of this call.
PyObject* how_of(const Autograd& autograd, PyObject* const* values) {
  if (autograd.numbers.empty()) return Py_NewRef(autograd.how);
  PyObject* old = PyTuple_GET_ITEM(autograd.how, 2);
  PyObject* rest = PyTuple_New(PyTuple_GET_SIZE(old));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(old); ++i) PyTuple_SET_ITEM(rest, i, Py_NewRef(PyTuple_GET_ITEM(old, i)));
  for (auto [place, slot] : autograd.numbers) PyTuple_SetItem(rest, place, Py_NewRef(values[slot]));
  PyObject* how = PyTuple_New(4);
  for (int i = 0; i < 4; ++i) PyTuple_SET_ITEM(how, i, i == 2 ? rest : Py_NewRef(PyTuple_GET_ITEM(autograd.how, i)));
  return how;
}

// A call that takes part in autograd. nullptr without an error set: the slow path must serve.
PyObject* differentiable(Table* training, const Program& program, PyObject* const* values, int n) {
  const Autograd& autograd = *program.autograd;
  std::vector<at::Tensor> made;
  if (!run(training, program, values, n, made)) return nullptr;
  torch::autograd::edge_list edges;
  std::vector<int> places;
  for (int i = 0; i < n; ++i) {
    if (!is_tensor(values[i])) continue;
    const at::Tensor& t = THPVariable_Unpack(values[i]);
    edges.push_back(t.requires_grad() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
    places.push_back(i);
  }
  auto* node = new Gradient(autograd, how_of(autograd, values), n, std::move(edges), std::move(places));
  NodePointer pointer = make_node<NodePointer>(node);
  auto result = [&](int k) -> const at::Tensor& { return made[program.results[k].slot - n]; };
  for (int k = 0; k < autograd.outputs; ++k) {
    node->integer.push_back(!torch::autograd::isDifferentiableType(result(k).scalar_type()));
    if (node->integer.back())
      pointer->add_input_metadata(torch::autograd::Node::undefined_input());
    else
      torch::autograd::set_history(result(k), pointer);
  }
  for (int s : autograd.sources)
    node->saved.emplace_back(s < n ? THPVariable_Unpack(values[s]) : result(s - n), s >= n && s - n < autograd.outputs);
  if (autograd.outputs == 1) return THPVariable_Wrap(result(0));
  PyObject* outs = PyTuple_New(autograd.outputs);
  for (int k = 0; k < autograd.outputs; ++k) PyTuple_SET_ITEM(outs, k, THPVariable_Wrap(result(k)));
  PyObject* wrapped = PyObject_CallOneArg(autograd.wrap, outs);
  Py_DECREF(outs);
  return wrapped;
}

}  // namespace
