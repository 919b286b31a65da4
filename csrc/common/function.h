// A Python function of kernels: its arguments by name, the tensors that it makes, its launch, its errors.
#pragma once

#include "arguments.h"

// New tensors, on the device of those read: the owner of one, and its address.
struct Made {
  py::object tensor;
  char* data;
};

inline Made made_of(py::object tensor) {
  View v;
  view_of(tensor.ptr(), v);
  return {std::move(tensor), v.at<char>()};
}

inline Made make(Reader& read, const int64_t* shape, int ndim, Element element) {
  static PyObject* const kNames = py::make_tuple("dtype", "device").release().ptr();
  std::vector<py::object> sizes(ndim);
  std::vector<PyObject*> arguments(ndim + 3);
  for (int d = 0; d < ndim; ++d) {
    sizes[d] = py::int_(shape[d]);
    arguments[d] = sizes[d].ptr();
  }
  const py::tuple none(0);  // no sizes are the shape of a number
  const int positional = ndim ? ndim : 1;
  if (!ndim) arguments[0] = none.ptr();
  arguments[positional] = torch.dtypes[int(element)];
  arguments[positional + 1] = read.device();
  return made_of(checked(PyObject_Vectorcall(torch.empty, arguments.data(), positional, kNames)));
}

inline float* floats(const Made& made) { return reinterpret_cast<float*>(made.data); }

// A new latent of the shape of the first, for a kernel to write.
inline Made make_like_first(Reader& read, DType dtype, Latent& latent) {
  Made made = make(read, read.first().shape, read.first().ndim, Element(dtype));
  latent = {made.data, read.size, dtype};
  return made;
}

// Without the interpreter's lock, as long as it lives.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

// The arguments of a call: as many as its function names, which the compiler counts.
template <size_t count>
using Given = PyObject* const (&)[count];

// Some of them, that a function of theirs names.
template <size_t first, size_t count, size_t all>
Given<count> part(Given<all> given) {
  static_assert(first + count <= all);
  return *reinterpret_cast<PyObject* const(*)[count]>(given + first);
}

template <size_t count>
constexpr Py_ssize_t count_of(py::object (*)(Given<count>, Reader&)) {
  return count;
}

// A Python function of positional arguments.
template <auto call>
PyObject* function(PyObject*, PyObject* const* values, Py_ssize_t given) {
  constexpr Py_ssize_t count = count_of(call);
  if (given != count && given != count + 1) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
    return nullptr;
  }
  try {
    Reader reader(given > count ? values[count] : nullptr);
    return call(*reinterpret_cast<PyObject* const(*)[count]>(values), reader).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
