// What a replay is made of, and how it runs: included by _native.cpp alone.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <structmember.h>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace {

// The driver's launch function (`cuLaunchKernel`, `hipModuleLaunchKernel`).
using Enter = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
// `CUlaunchConfig` with one attribute, `cuLaunchKernelEx` and the attribute of a kernel that waits itself for the launch before it.
struct Attribute {
  int id, unused, value, rest[15];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};
using Follow = int (*)(const Config*, void*, void**, void**);
constexpr Attribute kFollows{6, 0, 1, {}};
// torch's C function for the handle of the current stream of a device.
using Stream = int (*)(int32_t, void**);

struct State {
  Enter enter = nullptr;
  Follow follow = nullptr;
  Stream stream = nullptr;
  PyObject* refuse = nullptr;  // raises for a second derivative
  PyObject* fake = nullptr;    // receives launches instead of the driver, in tests
  c10::DeviceType type = c10::DeviceType::CPU;
  bool ready = false;
  int paused = 0;
  std::map<std::string, int64_t> counts;  // launches by kernel; its nodes never move
} state;

constexpr int kValues = 48;       // arguments of a call: a key has a bit for each
constexpr int kWords = 512;       // words of a key
constexpr int kParameters = 256;  // words of the parameters of a kernel
constexpr int kSlots = 96;        // arguments and allocations

struct Patch {
  int parameter;  // its word
  char type;  // p: pointer, f: float, d: double, i: int32, l: int64
  int slot;
  int64_t offset;
};

struct Launch {
  std::string name;
  void* function;
  unsigned grid[3];
  unsigned threads, shared;
  std::vector<uint64_t> parameters;
  std::vector<Patch> patches;
  std::vector<int> starts;  // the words at which parameters begin
  int follows;              // whether it waits itself for the launch before it
  int64_t* count;
};

struct Allocation {
  std::vector<int64_t> shape, stride;
  at::ScalarType dtype;
  c10::DispatchKeySet keys;
};

struct Result {
  int slot = -1;  // -1: None
  bool view = false;
  std::vector<int64_t> shape, stride;
  int64_t offset = 0;
};

// What a call that needs a gradient has besides its program, whose first results are its outputs.
struct Autograd {
  std::string name;
  PyObject* gradients = nullptr;  // gradients(how, needs, *grads, *saved)
  PyObject* how = nullptr;
  PyObject* wrap = nullptr;                   // makes the result of several outputs
  std::vector<std::pair<int, int>> numbers;   // place among the values of `how`, argument
  std::vector<int> sources;                   // what is saved: arguments, then results
  int outputs = 0;
  uint64_t differentiable = 0;  // bits by argument
  ~Autograd() {
    Py_XDECREF(gradients);
    Py_XDECREF(how);
    Py_XDECREF(wrap);
  }
};

struct Program {
  c10::Device device{c10::DeviceType::CPU};
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<Result> results;
  bool single = false;
  PyObject* wrap = nullptr;
  std::unique_ptr<Autograd> autograd;
  ~Program() { Py_XDECREF(wrap); }
};

struct Entry {
  std::vector<uint64_t> key;
  std::shared_ptr<Program> program;
};

struct Table {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* slow;
  PyObject* training;  // the table of calls that need a gradient, or null
  PyObject* into;      // the table of calls with `out` as last argument, or null
  PyObject* names;     // of the parameters, or empty: positional only, any number
  PyObject* defaults;  // by parameter; NotImplemented where there is none
  int positional;      // how many may be given by position
  int out;             // the parameter that must be absent, or -1
  std::vector<char>* linked;  // by argument: 2 any number, 1 floats only: their values do not matter
  std::vector<int>* writes;
  std::unordered_map<uint64_t, std::vector<Entry>>* entries;
  int64_t size;
};

// -- replaying --------------------------------------------------------------------------------------------------------------

bool is_tensor(PyObject* v) {
  return Py_TYPE(v) == reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
      Py_TYPE(v) == reinterpret_cast<PyTypeObject*>(ParameterClass);
}

// False: a tensor that is written shares memory with another argument, or cannot be written in this mode.
bool writable(Table* self, PyObject* const* values, int n) {
  for (int w : *self->writes) {
    const at::Tensor& target = THPVariable_Unpack(values[w]);
    if (target.is_inference() && !c10::InferenceMode::is_enabled()) return false;
    const void* memory = target.storage().data();
    for (int i = 0; i < n; ++i)
      if (i != w && is_tensor(values[i]) && THPVariable_Unpack(values[i]).storage().data() == memory) return false;
  }
  return true;
}

// False: a number does not fit its parameter.
bool write_number(uint64_t& word, char type, PyObject* v) {
  word = 0;
  if (type == 'f' || type == 'd') {
    int overflow = 0;
    double x;
    if (PyFloat_CheckExact(v))
      x = PyFloat_AS_DOUBLE(v);
    else
      x = static_cast<double>(PyLong_AsLongLongAndOverflow(v, &overflow));
    float narrow = static_cast<float>(x);
    // Python refuses what torch refuses: integers over 64 bits, numbers that become infinite.
    if (overflow || (type == 'f' && std::isinf(narrow) && !std::isinf(x))) return false;
    std::memcpy(&word, type == 'f' ? static_cast<void*>(&narrow) : static_cast<void*>(&x), type == 'f' ? 4 : 8);
    return true;
  }
  if (!PyLong_CheckExact(v)) return false;
  int overflow = 0;
  long long x = PyLong_AsLongLongAndOverflow(v, &overflow);
  if (overflow || (type == 'i' && x != static_cast<int32_t>(x))) return false;
  word = static_cast<uint64_t>(x);
  return true;
}

PyObject* report_fake(const Launch& one, const uint64_t* parameters) {
  PyObject* list = PyTuple_New(static_cast<Py_ssize_t>(one.parameters.size()));
  if (!list) return nullptr;
  for (size_t i = 0; i < one.parameters.size(); ++i)
    PyTuple_SET_ITEM(list, static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(parameters[i]));
  return PyObject_CallFunction(
      state.fake, "sK(III)N", one.name.c_str(), reinterpret_cast<unsigned long long>(one.function), one.grid[0],
      one.grid[1], one.grid[2], list);
}

// Launches; the GIL is held only where launches are faked. Returns the driver's error.
int launch(const Launch& one, PyObject* const* values, int n, void* const* memory, void* stream, bool& fits) {
  uint64_t parameters[kParameters];
  void* where[kParameters];
  size_t count = one.parameters.size();
  std::memcpy(parameters, one.parameters.data(), 8 * count);
  for (const Patch& p : one.patches) {
    if (p.type == 'p')
      parameters[p.parameter] = reinterpret_cast<uint64_t>(memory[p.slot]) + p.offset;
    else if (p.slot >= n || !write_number(parameters[p.parameter], p.type, values[p.slot])) {
      fits = false;
      return 0;
    }
  }
  for (size_t i = 0; i < one.starts.size(); ++i) where[i] = &parameters[one.starts[i]];
  ++*one.count;
  if (state.fake) {
    PyObject* r = report_fake(one, parameters);
    Py_XDECREF(r);
    return r ? 0 : -1;
  }
  int code;
  // The driver waits here when its queue is full: other threads must go on.
  PyThreadState* thread = PyEval_SaveThread();
  if (one.follows && state.follow) {
    Config config{{one.grid[0], one.grid[1], one.grid[2]}, {one.threads, 1, 1}, one.shared, stream, &kFollows, 1};
    code = state.follow(&config, one.function, where, nullptr);
  } else {
    code = state.enter(
        one.function, one.grid[0], one.grid[1], one.grid[2], one.threads, 1, 1, one.shared, stream, where, nullptr);
  }
  PyEval_RestoreThread(thread);
  return code;
}

PyObject* results_of(const Program& program, PyObject* const* values, int n, std::vector<at::Tensor>& made) {
  auto one = [&](const Result& r) -> PyObject* {
    if (r.slot < 0) Py_RETURN_NONE;
    if (r.view) {
      const at::Tensor& base = r.slot < n ? THPVariable_Unpack(values[r.slot]) : made[r.slot - n];
      return THPVariable_Wrap(base.as_strided(r.shape, r.stride, base.storage_offset() + r.offset));
    }
    if (r.slot < n) return Py_NewRef(values[r.slot]);
    return THPVariable_Wrap(made[r.slot - n]);
  };
  if (program.single) return one(program.results[0]);
  PyObject* all = PyTuple_New(static_cast<Py_ssize_t>(program.results.size()));
  if (!all) return nullptr;
  for (size_t i = 0; i < program.results.size(); ++i) {
    PyObject* r = one(program.results[i]);
    if (!r) {
      Py_DECREF(all);
      return nullptr;
    }
    PyTuple_SET_ITEM(all, static_cast<Py_ssize_t>(i), r);
  }
  if (!program.wrap) return all;
  PyObject* wrapped = PyObject_CallOneArg(program.wrap, all);
  Py_DECREF(all);
  return wrapped;
}

// Allocates into `made` and launches. False: an error is set, or (without one) the slow path must serve.
bool run(Table* self, const Program& program, PyObject* const* values, int n, std::vector<at::Tensor>& made) {
  void* memory[kSlots];
  for (int i = 0; i < n; ++i)
    memory[i] = is_tensor(values[i]) ? const_cast<void*>(THPVariable_Unpack(values[i]).unsafeGetTensorImpl()->data()) : nullptr;
  for (int w : *self->writes) memory[w] = THPVariable_Unpack(values[w]).mutable_data_ptr();
  c10::OptionalDeviceGuard guard;
  void* stream = nullptr;
  if (!state.fake) {
    c10::impl::VirtualGuardImpl device(program.device.type());
    if (device.getDevice() != program.device) guard.reset_device(program.device);
    if (state.stream(program.device.index(), &stream)) {
      PyErr_SetString(PyExc_RuntimeError, "gemskit: torch does not tell the current stream");
      return false;
    }
  }
  made.reserve(program.allocations.size());
  auto* allocator = c10::GetAllocator(program.device.type());
  for (const Allocation& a : program.allocations) {
    made.emplace_back(at::detail::empty_strided_generic(a.shape, a.stride, allocator, a.keys, a.dtype));
    memory[n + made.size() - 1] = made.back().unsafeGetTensorImpl()->mutable_data();
  }
  bool first = true;
  for (const Launch& one : program.launches) {
    bool fits = true;
    int code = launch(one, values, n, memory, stream, fits);
    if (!fits) return false;  // numbers are in the first launch of a program, or in every one
    if (code && first && !state.fake) {
      // This thread may not have touched the device yet: a query of the stream makes its context current.
      c10::impl::VirtualGuardImpl device(program.device.type());
      device.queryStream(device.getStream(program.device));
      code = launch(one, values, n, memory, stream, fits);
    }
    if (code) {
      if (!PyErr_Occurred())
        PyErr_Format(
            PyExc_RuntimeError, "%s: the driver refused the launch with error %d (grid %u, %u, %u; %u threads, %u bytes of "
            "shared memory)", one.name.c_str(), code, one.grid[0], one.grid[1], one.grid[2], one.threads, one.shared);
      return false;
    }
    first = false;
  }
  for (int w : *self->writes) THPVariable_Unpack(values[w]).unsafeGetTensorImpl()->bump_version();
  return true;
}

}  // namespace
