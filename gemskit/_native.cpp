// The native launcher: finds a call that has been made before and replays it, without Python code.
//
// A Table is what `gemskit._replay.Table` is, in front of which it stands: a map from what a call depends on (layouts, alignments,
// settings, values that are no tensors) to a program (allocations, launches, results). Whatever it does not know, or does not
// understand, it hands to `slow` with the arguments as they came. It is built against the headers of the installed torch.

#include "_native_autograd.h"

namespace {

// -- keys -------------------------------------------------------------------------------------------------------------------

struct Key {
  std::array<uint64_t, kWords> words;
  int n = 0;
  bool full = false;
  void push(uint64_t w) {
    if (n < kWords)
      words[n++] = w;
    else
      full = true;
  }
  uint64_t hash() const {
    uint64_t h = 0x9E3779B97F4A7C15ull;
    for (int i = 0; i < n; ++i) {
      h = (h ^ words[i]) * 0xFF51AFD7ED558CCDull;
      h ^= h >> 32;
    }
    return h;
  }
};

enum Tag : uint64_t { kNone = 1, kFalse, kTrue, kInt, kFloat, kString, kDtype, kSequence, kTensor, kLinkedInt, kLinkedFloat };

// False: this value is for the slow path.
bool add_value(Key& key, PyObject* v, int link) {
  if (v == Py_None) {
    key.push(kNone);
  } else if (v == Py_True || v == Py_False) {
    key.push(v == Py_True ? kTrue : kFalse);
  } else if (PyLong_CheckExact(v)) {
    if (link > 1) {
      key.push(kLinkedInt);
    } else {
      int overflow = 0;
      long long x = PyLong_AsLongLongAndOverflow(v, &overflow);
      if (overflow) return false;
      key.push(kInt);
      key.push(static_cast<uint64_t>(x));
    }
  } else if (PyFloat_CheckExact(v)) {
    if (link) {
      key.push(kLinkedFloat);
    } else {
      double x = PyFloat_AS_DOUBLE(v);
      uint64_t bits;
      std::memcpy(&bits, &x, 8);
      key.push(kFloat);
      key.push(bits);
    }
  } else if (PyUnicode_CheckExact(v)) {
    key.push(kString | static_cast<uint64_t>(PyUnicode_GET_LENGTH(v)) << 8);
    key.push(static_cast<uint64_t>(PyObject_Hash(v)));
  } else if (THPDtype_Check(v)) {
    key.push(kDtype | static_cast<uint64_t>(reinterpret_cast<THPDtype*>(v)->scalar_type) << 8);
  } else if (PyTuple_Check(v) || PyList_CheckExact(v)) {
    Py_ssize_t n = PySequence_Fast_GET_SIZE(v);
    key.push(kSequence | static_cast<uint64_t>(n) << 8);
    for (Py_ssize_t i = 0; i < n; ++i)
      if (!add_value(key, PySequence_Fast_GET_ITEM(v, i), 0)) return false;
  } else {
    return false;
  }
  return true;
}

bool add_tensor(Key& key, const at::Tensor& t) {
  auto* impl = t.unsafeGetTensorImpl();
  if (impl->device_type() != state.type || !impl->has_storage()) return false;
  // Forward-mode derivatives are not computed: Python refuses them.
  if (impl->autograd_meta() && t._fw_grad(0).defined()) return false;
  auto sizes = impl->sizes(), strides = impl->strides();
  auto address = reinterpret_cast<uintptr_t>(impl->data());
  key.push(
      kTensor | static_cast<uint64_t>(t.scalar_type()) << 8 | static_cast<uint64_t>(sizes.size()) << 16 |
      static_cast<uint64_t>(address & 15) << 32 | static_cast<uint64_t>(static_cast<uint8_t>(impl->device().index())) << 40);
  // Wrapped, conjugated, negated and sparse tensors have other keys.
  key.push(impl->key_set().raw_repr());
  for (auto x : sizes) key.push(static_cast<uint64_t>(x));
  for (auto x : strides) key.push(static_cast<uint64_t>(x));
  return true;
}

template <typename C, typename Precision, typename Backend, typename Operation>
bool is_tf32_by_enum(const C& context, Precision (C::*get)(Backend, Operation) const) {
  return (context.*get)(Backend::CUDA, Operation::MATMUL) == Precision::TF32;
}

// Whether float32 products may run in TensorFloat-32. torch 2.9 names backend, operation and precision by strings.
template <typename C>
auto is_tf32(const C& context, int) -> decltype(context.float32Precision(std::string(), std::string()) == "tf32") {
  return context.float32Precision("cuda", "matmul") == "tf32";
}

template <typename C>
bool is_tf32(const C& context, long) {
  return is_tf32_by_enum(context, &C::float32Precision);
}

// The first word holds settings, and from bit 8 on which arguments need a gradient.
constexpr int kNeeds = 8;

bool make_key(Key& key, Table* self, PyObject* const* values, int n) {
  bool grad = c10::GradMode::is_enabled(), tensors = false;
  auto& context = at::globalContext();
  uint64_t needs = 0;
  bool tf32 = is_tf32(context, 0);
  key.push(static_cast<uint64_t>(tf32) << 1 | context.deterministicAlgorithms());
  for (int i = 0; i < n; ++i) {
    if (is_tensor(values[i])) {
      const at::Tensor& t = THPVariable_Unpack(values[i]);
      if (!add_tensor(key, t)) return false;
      if (grad && t.requires_grad()) needs |= 1ull << i;
      tensors = true;
    } else if (!add_value(key, values[i], i < static_cast<int>(self->linked->size()) ? (*self->linked)[i] : 0)) {
      return false;
    }
  }
  key.words[0] |= needs << kNeeds;
  return tensors && !key.full;
}

Program* find(Table* self, const Key& key, std::shared_ptr<Program>& hold) {
  auto found = self->entries->find(key.hash());
  if (found == self->entries->end()) return nullptr;
  for (auto& e : found->second)
    if (static_cast<int>(e.key.size()) == key.n && !std::memcmp(e.key.data(), key.words.data(), 8 * key.n)) {
      hold = e.program;  // another thread may clear the table while this one launches
      return hold.get();
    }
  return nullptr;
}

// -- calls ------------------------------------------------------------------------------------------------------------------

// The arguments by parameter; false where Python must raise, or has more to do.
bool bind(Table* self, PyObject* const* args, Py_ssize_t given, PyObject* keywords, PyObject** values, int& n) {
  Py_ssize_t parameters = PyTuple_GET_SIZE(self->names);
  if (!parameters) {
    if (keywords || given > kValues) return false;
    n = static_cast<int>(given);
    std::memcpy(values, args, sizeof(PyObject*) * given);
    return true;
  }
  if (given > self->positional) return false;
  n = static_cast<int>(parameters);
  for (Py_ssize_t i = 0; i < given; ++i) values[i] = args[i];
  for (Py_ssize_t i = given; i < parameters; ++i) values[i] = nullptr;
  Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* name = PyTuple_GET_ITEM(keywords, k);
    Py_ssize_t i = 0;
    while (i < parameters && PyTuple_GET_ITEM(self->names, i) != name) ++i;  // names are interned, as a rule
    if (i == parameters)
      for (i = 0; i < parameters && PyUnicode_Compare(PyTuple_GET_ITEM(self->names, i), name);) ++i;
    if (i == parameters || values[i]) return false;
    values[i] = args[given + k];
  }
  for (Py_ssize_t i = given; i < parameters; ++i) {
    if (values[i]) continue;
    values[i] = PyTuple_GET_ITEM(self->defaults, i);
    if (values[i] == Py_NotImplemented) return false;
  }
  if (self->out >= 0 && values[self->out] == Py_None) n = self->out;  // it is the last one
  return true;
}

PyObject* table_call(PyObject* object, PyObject* const* args, size_t nargsf, PyObject* keywords) {
  auto* self = reinterpret_cast<Table*>(object);
  HANDLE_TH_ERRORS
  if (state.ready && !state.paused && !c10::impl::TorchDispatchModeTLS::any_modes_set()) {
    PyObject* values[kValues];
    int n = 0;
    Key key;
    std::shared_ptr<Program> hold;
    bool bound = bind(self, args, PyVectorcall_NARGS(nargsf), keywords, values, n);
    Table* table = self->out >= 0 && n > self->out ? reinterpret_cast<Table*>(self->into) : self;
    if (bound && table && make_key(key, table, values, n)) {
      uint64_t needs = key.words[0] >> kNeeds;
      Program* program = find(table, key, hold);
      PyObject* result = nullptr;
      if (program && (table->writes->empty() || writable(table, values, n))) {
        std::vector<at::Tensor> made;
        if (run(table, *program, values, n, made)) return results_of(*program, values, n, made);
      } else if (needs && table->training) {
        auto* training = reinterpret_cast<Table*>(self->training);
        key.words[0] ^= needs << kNeeds;
        program = find(training, key, hold);
        if (program && program->autograd && !(needs & ~program->autograd->differentiable))
          result = differentiable(training, *program, values, n);
      }
      if (result || PyErr_Occurred()) return result;
    }
  }
  return PyObject_Vectorcall(self->slow, args, nargsf, keywords);
  END_HANDLE_TH_ERRORS
}

// -- programs from Python ---------------------------------------------------------------------------------------------------

bool integers(PyObject* o, std::vector<int64_t>& into) {
  Py_ssize_t n = PyTuple_Check(o) ? PyTuple_GET_SIZE(o) : -1;
  if (n < 0) {
    PyErr_SetString(PyExc_TypeError, "a tuple of integers is expected");
    return false;
  }
  for (Py_ssize_t i = 0; i < n; ++i) into.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(o, i)));
  return !PyErr_Occurred();
}

bool read_launch(PyObject* o, Launch& one, Py_ssize_t slots) {
  const char* name;
  unsigned long long function;
  PyObject *parameters, *patches, *starts;
  if (!PyArg_ParseTuple(
          o, "sK(III)IIO!O!O!p", &name, &function, &one.grid[0], &one.grid[1], &one.grid[2], &one.threads, &one.shared,
          &PyTuple_Type, &parameters, &PyTuple_Type, &patches, &PyTuple_Type, &starts, &one.follows))
    return false;
  one.name = name;
  one.function = reinterpret_cast<void*>(function);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters); ++i)
    one.parameters.push_back(PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(parameters, i)));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(patches); ++i) {
    Patch p;
    int type;
    long long offset;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(patches, i), "iCiL", &p.parameter, &type, &p.slot, &offset)) return false;
    p.type = static_cast<char>(type);
    p.offset = offset;
    if (p.parameter < 0 || p.parameter >= static_cast<int>(one.parameters.size()) || p.slot < 0 || p.slot >= slots) {
      PyErr_SetString(PyExc_ValueError, "a patch is out of range");
      return false;
    }
    one.patches.push_back(p);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(starts); ++i) {
    one.starts.push_back(PyLong_AsLong(PyTuple_GET_ITEM(starts, i)));
    if (one.starts.back() < 0 || one.starts.back() >= static_cast<int>(one.parameters.size())) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a parameter begins out of range");
      return false;
    }
  }
  if (one.parameters.size() > kParameters || one.starts.size() > kParameters) {
    PyErr_SetString(PyExc_ValueError, "a kernel has too many parameters");
    return false;
  }
  one.count = &state.counts[one.name];
  return !PyErr_Occurred();
}

bool read_autograd(PyObject* o, Program& program, Py_ssize_t values) {
  auto autograd = std::make_unique<Autograd>();
  const char* name;
  PyObject *gradients, *how, *wrap, *numbers, *sources;
  unsigned long long differentiable;
  if (!PyArg_ParseTuple(
          o, "sOO!OO!O!iK", &name, &gradients, &PyTuple_Type, &how, &wrap, &PyTuple_Type, &numbers, &PyTuple_Type, &sources,
          &autograd->outputs, &differentiable))
    return false;
  autograd->name = name;
  autograd->gradients = Py_NewRef(gradients);
  autograd->how = Py_NewRef(how);
  autograd->wrap = Py_NewRef(wrap);
  autograd->differentiable = differentiable;
  std::vector<int64_t> saved;
  if (!integers(sources, saved)) return false;
  autograd->sources.assign(saved.begin(), saved.end());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(numbers); ++i) {
    int place, slot;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(numbers, i), "ii", &place, &slot)) return false;
    autograd->numbers.emplace_back(place, slot);
  }
  // An output that is an argument, or a view of one, would get the history of both: Python serves those.
  for (const Result& r : program.results)
    if (r.view || r.slot < values) return true;
  program.autograd = std::move(autograd);
  return true;
}

bool read_program(PyObject* spec, Program& program, Py_ssize_t values) {
  PyObject *index, *allocations, *launches, *results, *wrap, *autograd;
  int single;
  if (!PyArg_ParseTuple(
          spec, "OO!O!O!pOO", &index, &PyTuple_Type, &allocations, &PyTuple_Type, &launches, &PyTuple_Type, &results, &single,
          &wrap, &autograd))
    return false;
  program.device = c10::Device(state.type, index == Py_None ? -1 : static_cast<c10::DeviceIndex>(PyLong_AsLong(index)));
  Py_ssize_t slots = values + PyTuple_GET_SIZE(allocations);
  if (slots > kSlots) {
    PyErr_SetString(PyExc_ValueError, "a call has too many tensors");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(allocations); ++i) {
    Allocation a;
    PyObject *shape, *stride, *dtype;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(allocations, i), "OOO", &shape, &stride, &dtype)) return false;
    if (!integers(shape, a.shape) || !integers(stride, a.stride)) return false;
    a.dtype = reinterpret_cast<THPDtype*>(dtype)->scalar_type;
    a.keys = c10::DispatchKeySet(c10::computeDispatchKey(a.dtype, std::nullopt, program.device));
    program.allocations.push_back(std::move(a));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); ++i) {
    program.launches.emplace_back();
    if (!read_launch(PyTuple_GET_ITEM(launches, i), program.launches.back(), slots)) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(results); ++i) {
    Result r;
    PyObject* o = PyTuple_GET_ITEM(results, i);
    if (o != Py_None) {
      r.slot = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(o, 0)));
      r.view = PyTuple_GET_SIZE(o) > 1;
      if (r.view) {
        if (!integers(PyTuple_GET_ITEM(o, 1), r.shape) || !integers(PyTuple_GET_ITEM(o, 2), r.stride)) return false;
        r.offset = PyLong_AsLongLong(PyTuple_GET_ITEM(o, 3));
      }
      if (r.slot < 0 || r.slot >= slots) {
        PyErr_SetString(PyExc_ValueError, "a result is out of range");
        return false;
      }
    }
    program.results.push_back(std::move(r));
  }
  program.single = single && program.results.size() == 1;
  program.wrap = wrap == Py_None ? nullptr : Py_NewRef(wrap);
  if (autograd != Py_None && !read_autograd(autograd, program, values)) return false;
  return !PyErr_Occurred();
}

PyObject* table_add(PyObject* object, PyObject* args) {
  auto* self = reinterpret_cast<Table*>(object);
  HANDLE_TH_ERRORS
  PyObject *values, *spec;
  if (!PyArg_ParseTuple(args, "O!O!", &PyTuple_Type, &values, &PyTuple_Type, &spec)) return nullptr;
  Py_ssize_t n = PyTuple_GET_SIZE(values);
  PyObject* items[kValues];
  Key key;
  if (n > kValues) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < n; ++i) items[i] = PyTuple_GET_ITEM(values, i);
  if (!make_key(key, self, items, static_cast<int>(n))) Py_RETURN_FALSE;
  auto program = std::make_shared<Program>();
  if (!read_program(spec, *program, n)) return nullptr;
  auto& chain = (*self->entries)[key.hash()];
  chain.push_back({std::vector<uint64_t>(key.words.begin(), key.words.begin() + key.n), std::move(program)});
  ++self->size;
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* table_clear(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<Table*>(object);
  // Programs hold Python objects whose destructors may run code: let go of the map first.
  std::unordered_map<uint64_t, std::vector<Entry>> old;
  old.swap(*self->entries);
  self->size = 0;
  Py_RETURN_NONE;
}

Py_ssize_t table_length(PyObject* object) { return static_cast<Py_ssize_t>(reinterpret_cast<Table*>(object)->size); }

PyObject* table_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *slow, *linked, *writes, *names, *defaults;
  int positional, out;
  if (!PyArg_ParseTuple(
          args, "OO!O!O!O!ii", &slow, &PyTuple_Type, &linked, &PyTuple_Type, &writes, &PyTuple_Type, &names, &PyTuple_Type,
          &defaults, &positional, &out))
    return nullptr;
  if (PyTuple_GET_SIZE(names) > kValues) {
    PyErr_SetString(PyExc_ValueError, "an operator has too many parameters");
    return nullptr;
  }
  auto* self = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->call = table_call;
  self->slow = Py_NewRef(slow);
  self->training = self->into = nullptr;
  self->names = Py_NewRef(names);
  self->defaults = Py_NewRef(defaults);
  self->positional = positional;
  self->out = out;
  self->linked = new std::vector<char>;
  self->writes = new std::vector<int>;
  self->entries = new std::unordered_map<uint64_t, std::vector<Entry>>;
  self->size = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(linked); ++i)
    self->linked->push_back(static_cast<char>(PyLong_AsLong(PyTuple_GET_ITEM(linked, i))));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(writes); ++i)
    self->writes->push_back(static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(writes, i))));
  return reinterpret_cast<PyObject*>(self);
}

int table_traverse(PyObject* object, visitproc visit, void* arg) {
  auto* self = reinterpret_cast<Table*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->slow);
  Py_VISIT(self->training);
  Py_VISIT(self->into);
  if (self->entries)
    for (auto& chain : *self->entries)
      for (auto& e : chain.second) {
        Py_VISIT(e.program->wrap);
        if (!e.program->autograd) continue;
        Py_VISIT(e.program->autograd->gradients);
        Py_VISIT(e.program->autograd->how);
        Py_VISIT(e.program->autograd->wrap);
      }
  return 0;
}

int table_release(PyObject* object) {
  auto* self = reinterpret_cast<Table*>(object);
  Py_CLEAR(self->slow);
  Py_CLEAR(self->training);
  Py_CLEAR(self->into);
  if (self->entries) Py_XDECREF(table_clear(object, nullptr));
  return 0;
}

void table_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<Table*>(object);
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  table_release(object);
  Py_CLEAR(self->names);
  Py_CLEAR(self->defaults);
  delete self->linked;
  delete self->writes;
  delete self->entries;
  type->tp_free(object);
  Py_DECREF(type);
}

// link(training, into): the tables of calls that need a gradient, and of those with `out` as last argument.
PyObject* table_link(PyObject* object, PyObject* args) {
  PyObject *training, *into;
  if (!PyArg_ParseTuple(args, "O!O!", Py_TYPE(object), &training, Py_TYPE(object), &into)) return nullptr;
  auto* self = reinterpret_cast<Table*>(object);
  Py_XSETREF(self->training, Py_NewRef(training));
  Py_XSETREF(self->into, Py_NewRef(into));
  Py_RETURN_NONE;
}

PyMethodDef table_methods[] = {
    {"link", table_link, METH_VARARGS, "link(training, into): tables of calls that need a gradient, that have an out."},
    {"add", table_add, METH_VARARGS, "add(values, program): serve such calls; False if they cannot be."},
    {"clear", table_clear, METH_NOARGS, "Forget all calls."},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef table_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Table, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot table_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(table_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(table_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(table_release)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, table_methods},
    {Py_tp_members, table_members},
    {Py_sq_length, reinterpret_cast<void*>(table_length)},
    {0, nullptr},
};

PyType_Spec table_spec = {
    "_gemskit_native.Table", sizeof(Table), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, table_slots};

// -- the module -------------------------------------------------------------------------------------------------------------

// configure(device type, addresses of the launch function, of the one for kernels that follow (or 0) and of the stream function,
// refuse, fake or None)
PyObject* configure(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  const char* type;
  unsigned long long enter, follow, stream;
  PyObject *refuse, *fake;
  if (!PyArg_ParseTuple(args, "sKKKOO", &type, &enter, &follow, &stream, &refuse, &fake)) return nullptr;
  state.type = c10::Device(type).type();
  state.enter = reinterpret_cast<Enter>(enter);
  state.follow = reinterpret_cast<Follow>(follow);
  state.stream = reinterpret_cast<Stream>(stream);
  Py_XSETREF(state.refuse, Py_NewRef(refuse));
  Py_XSETREF(state.fake, fake == Py_None ? nullptr : Py_NewRef(fake));
  state.ready = state.fake || (state.enter && state.stream);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* pause(PyObject*, PyObject* by) {
  state.paused += static_cast<int>(PyLong_AsLong(by));
  Py_RETURN_NONE;
}

PyObject* counts(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  for (auto& [name, n] : state.counts) {
    PyObject* v = PyLong_FromLongLong(n);
    PyDict_SetItemString(all, name.c_str(), v);
    Py_DECREF(v);
  }
  return all;
}

PyMethodDef methods[] = {
    {"configure", configure, METH_VARARGS, "How to launch."},
    {"pause", pause, METH_O, "While the sum of what was given is not 0, nothing is replayed."},
    {"counts", counts, METH_NOARGS, "Launches by kernel name."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_gemskit_native", nullptr, -1, methods};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__gemskit_native() {
  PyObject* m = PyModule_Create(&module);
  PyObject* type = PyType_FromSpec(&table_spec);
  if (!m || !type || PyModule_AddObject(m, "Table", type)) return nullptr;
  return m;
}
