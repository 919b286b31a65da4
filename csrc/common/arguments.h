// What kernels take, read out of the tensors and numbers of a Python call. One reader serves every device; values that lie on a
// device are never looked at here.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "latent.h"
#include "philox.h"
#include "tensors.h"

inline bool is_given(PyObject* x) { return x != Py_None; }

// The streams of noise, as flowkern.ops._common.arguments numbers them.
enum Stream : uint32_t { kStep = 1, kMatch = 2 };

// Reads the arguments of one call. What a kernel cannot take as it is makes the call one that is not served: nothing is run,
// Python gets None, and looks closer: it copies, converts or says what is wrong.
class Reader {
 public:
  // `last`, after the arguments of the call, is there where Python has checked them: True makes an error of what is not served.
  explicit Reader(PyObject* last) : is_checked_(last != nullptr), explains_(last == Py_True) {}
  bool serves = true;
  int64_t size = 0;  // elements of one sample, once the first latent is read

  void require(bool is_true, const char* what) {  // the name of an argument
    if (!is_true) refuse<py::value_error>(std::string(what) + ": not as the kernels read it");
  }
  template <class Error>
  void refuse(const std::string& what) {
    serves = false;
    if (explains_) throw Error(what);
  }

  // The first latent: its shape is that of all others but for the number of samples, which it gives.
  Latent first_latent(PyObject* x, int64_t& rows, const char* name) {
    const Latent latent = this->latent(x, -1, name);
    if (serves) rows = first_->shape[0];
    return latent;
  }
  // (rows, *D), each sample contiguous.
  Latent latent(PyObject* x, int64_t rows, const char* name) {
    View& v = views_[count_];
    if (!serves || !view(x, v, name) || v.ndim < 2 || int(v.element()) > int(Element::float16)) return refused(name);
    if (v.shape[0] > 0 && !v.is_packed(1)) return refused(name);
    if (!first_) {
      first_ = &v;
      like_ = x;
      size = 1;
      for (int d = 1; d < v.ndim; ++d) size *= v.shape[d];
    } else if (v.ndim != first_->ndim || v.shape[0] != rows || std::memcmp(v.shape + 1, first_->shape + 1, (v.ndim - 1) * 8) != 0) {
      return refused(name);
    }
    if (count_ < kLatents - 1) ++count_;
    return {v.at<char>(), v.strides[0], DType(v.element())};
  }
  Latent optional_latent(PyObject* x, int64_t rows, const char* name) { return x == Py_None ? Latent{} : latent(x, rows, name); }

  // A latent to be written, read after all others: contiguous, apart from all that is read, or exactly one that is at `in_place`.
  Latent output(PyObject* x, int64_t rows, const char* name, std::initializer_list<const char*> in_place, const NoiseKey& key) {
    const int others = count_;
    const Latent out = latent(x, rows, name);
    if (!serves) return {};
    const View& v = views_[others];
    const char *begin = out.data, *end = begin + rows * size * bytes_of(out.dtype);
    const auto is_apart = [=](const void* at, int64_t bytes) { return !at || at >= end || static_cast<const char*>(at) + bytes <= begin; };
    bool is_safe = v.is_packed(0) && !requires_grad(x);
    for (int j = 0; j < others; ++j) {
      const View& u = views_[j];
      const int64_t span = (u.is_packed(0) ? rows * size : (rows - 1) * u.strides[0] + size) * bytes_of(DType(u.element()));
      const bool is_same = u.at<char>() == begin && u.element() == v.element() && u.is_packed(0);
      const bool may_be = is_same && std::find(in_place.begin(), in_place.end(), begin) != in_place.end();
      is_safe &= may_be || is_apart(u.at<char>(), span);
    }
    is_safe &= is_apart(table_, table_bytes_) && is_apart(key.sample_id, rows * 8) && is_apart(key.step, rows * 8);
    return is_safe ? out : refused(name);
  }

  // What a forward pass has kept for its backward pass, which writes over it, or None.
  Latent kept(PyObject* x, int64_t rows, const int64_t* row) {
    if (x == Py_None) return {};
    const Latent kept = latent(x, rows, "residual");
    require(serves && kept.dtype == DType::float32 && !row, "residual");
    return kept;
  }

  // Contiguous (count,), or (count, columns): of float32, int64 or bool.
  template <class T>
  T* vector(PyObject* x, int64_t count, const char* name, int64_t columns = 0) {
    View v;
    using Value = std::remove_const_t<T>;
    const Element wanted = std::is_same_v<Value, float>  ? Element::float32
                           : std::is_same_v<Value, bool> ? Element::boolean
                                                         : Element::int64;
    const bool fits = serves && view(x, v, name) && v.element() == wanted && v.ndim == (columns ? 2 : 1) && v.shape[0] == count &&
                      (!columns || v.shape[1] == columns) && v.is_packed(0);
    require(fits, name);
    return fits ? v.at<T>() : nullptr;
  }
  template <class T>
  T* optional_vector(PyObject* x, int64_t count, const char* name) {
    return x == Py_None ? nullptr : vector<T>(x, count, name);
  }
  // A gradient of float32: (count,) of any stride, or one number for all.
  const float* gradient(PyObject* x, int64_t count, int64_t& stride) {
    View v;
    const bool fits =
        serves && view(x, v, "grad") && v.element() == Element::float32 && (v.ndim == 0 || (v.ndim == 1 && v.shape[0] == count));
    require(fits, "grad");
    stride = fits && v.ndim ? v.strides[0] : 0;
    return fits ? v.at<const float>() : nullptr;
  }
  // The velocity row of each sample: an index out of range would write past the gradient. On a device many samples are sorted by
  // it, so that no block looks through all of them.
  template <class Arguments>
  void row(PyObject* x, Arguments& to) {
    constexpr int64_t kFew = 1024;
    to.batch = to.rows;
    if (x == Py_None) return;
    View v;
    const bool fits = serves && view(x, v, "row") && v.ndim == 1;
    require(fits, "row");
    to.batch = fits ? v.shape[0] : 0;
    to.row = fits ? vector<const int64_t>(x, to.batch, "row") : nullptr;
    check_range(to.row, to.batch, to.rows, "row");
    if (!serves || torch.reads_values || to.batch <= kFew) return;
    siblings_ = checked(PyObject_CallFunction(torch.siblings, "OL", x, static_cast<long long>(to.rows)));
    to.order = vector<const int64_t>(PyTuple_GET_ITEM(siblings_.ptr(), 0), to.batch, "row");
    to.first = vector<const int64_t>(PyTuple_GET_ITEM(siblings_.ptr(), 1), to.rows + 1, "row");
  }

  // Step coefficients: flowkern.schedules.Coefficients; their table where they are checked. A float64 table is rounded here, on a
  // device by Python.
  const float* coefficients(PyObject* x, int64_t batch, int64_t& stride, int& num_history) {
    constexpr int64_t kColumns = 9;
    py::object table = py::reinterpret_borrow<py::object>(x);
    num_history = 0;
    if (Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(torch.coefficients)) {
      num_history = int(integer(checked(PyObject_GetAttr(x, torch.num_history)).ptr(), 0, 3, "num_history"));
      table = checked(PyObject_GetAttr(x, torch.table));
    } else {
      require(is_checked_, "edges");
    }
    View v;
    const bool fits = serves && view(table.ptr(), v, "edges") && v.ndim >= 1 && v.is_packed(v.ndim - 1) &&
                      v.shape[v.ndim - 1] == kColumns && (v.ndim == 1 || (v.ndim == 2 && v.shape[0] == batch));
    require(fits && (v.element() == Element::float32 || (v.element() == Element::float64 && torch.reads_values)), "edges");
    if (!serves) return nullptr;
    stride = v.ndim == 1 ? 0 : v.strides[0];
    table_ = v.at<const char>(), table_bytes_ = (stride * (batch - 1) + kColumns) * (v.element() == Element::float32 ? 4 : 8);
    if (v.element() == Element::float32) return v.at<const float>();
    for (int64_t b = 0; b < (v.ndim == 1 ? 1 : batch); ++b) {
      const double* wide = v.at<const double>() + b * stride;
      rounded_.insert(rounded_.end(), wide, wide + kColumns);
    }
    stride = v.ndim == 1 ? 0 : kColumns;
    return rounded_.data();
  }

  void check_fraction(const float* x, int64_t batch, const char* name) {
    if (!torch.reads_values) return require(!x || is_checked_ || !is_debugging(), name);
    for (int64_t b = 0; serves && b < batch; ++b) require(x[b] >= 0 && x[b] <= 1, name);
  }

  // Python's own numbers; others are for Python to convert.
  double number(PyObject* x, const char* name) {
    double value = NAN;
    if (PyFloat_CheckExact(x)) value = PyFloat_AS_DOUBLE(x);
    if (PyLong_CheckExact(x)) value = PyLong_AsDouble(x);
    if (PyErr_Occurred()) value = NAN, PyErr_Clear();
    require(!std::isnan(value), name);
    return value;
  }
  double number(PyObject* x, double least, double most, const char* name) {
    const double value = number(x, name);
    return require(value >= least && value <= most, name), value;
  }
  // A finite scale, which is 1 where there is nothing to guide away from.
  double guidance(PyObject* scale, PyObject* velocity_uncond) {
    const double value = number(scale, "guidance_scale");
    return require(std::isfinite(value) && (velocity_uncond != Py_None || value == 1), "guidance_scale"), value;
  }
  // A finite weight of something that may be absent, where the weight is 0.
  double coefficient(PyObject* x, PyObject* of, const char* name) {
    const double value = number(x, name);
    return require(std::isfinite(value) && value >= 0 && (of != Py_None || value == 0), name), value;
  }
  int64_t integer(PyObject* x, int64_t least, int64_t most, const char* name) {
    int overflow = 1;
    const int64_t value = PyLong_CheckExact(x) ? PyLong_AsLongLongAndOverflow(x, &overflow) : 0;
    return require(!overflow && value >= least && value <= most, name), value;
  }
  // Which of some words a string is.
  int choice(PyObject* x, std::initializer_list<const char*> words, const char* name) {
    int index = 0;
    for (const char* word : words) {
      if (PyUnicode_Check(x) && PyUnicode_CompareWithASCIIString(x, word) == 0) return index;
      ++index;
    }
    require(false, name);
    return 0;
  }

  // Philox noise from a seed of 64 bits, (batch,) ids, and a step: an integer, or (batch,).
  NoiseKey key(PyObject* seed, PyObject* sample_id, PyObject* step, int64_t batch, uint32_t stream) {
    constexpr int64_t kSteps = int64_t{1} << 28;
    NoiseKey key{0, vector<const int64_t>(sample_id, batch, "sample_id"), nullptr, 0, stream};
    if (PyLong_CheckExact(seed)) {
      int overflow = 0;
      key.seed = uint64_t(PyLong_AsLongLongAndOverflow(seed, &overflow));
      if (overflow > 0) key.seed = PyLong_AsUnsignedLongLong(seed);
      const bool fits = overflow >= 0 && !PyErr_Occurred();
      PyErr_Clear();
      require(fits, "seed");
    } else {
      require(false, "seed");
    }
    if (PyLong_CheckExact(step)) {
      key.step_value = integer(step, 0, kSteps - 1, "step");
    } else {
      key.step = vector<const int64_t>(step, batch, "step");
      check_range(key.step, batch, kSteps, "step");
    }
    return key;
  }
  // Noise given, or its key, which then is whole; neither where `sample_id` is None too.
  NoiseKey noise(PyObject* given, PyObject* seed, PyObject* sample_id, PyObject* step, int64_t batch, uint32_t stream, Latent& latent) {
    latent = optional_latent(given, batch, "noise");
    if (given == Py_None && sample_id != Py_None) return key(seed, sample_id, step, batch, stream);
    require(seed == Py_None && sample_id == Py_None && step == Py_None, "noise");
    return {0, nullptr, nullptr, 0, stream};
  }

  const View& first() const { return *first_; }  // of a call that is served
  int device_index() const { return first_->device.index; }
  PyObject* device() {
    if (!device_) device_ = checked(PyObject_GetAttr(like_, torch.device));
    return device_.ptr();
  }
  static bool requires_grad(PyObject* x) { return checked(PyObject_GetAttr(x, torch.requires_grad)).ptr() == Py_True; }

 private:
  static constexpr int kLatents = 12;
  bool is_checked_, explains_;
  int count_ = 0;
  View views_[kLatents] = {};
  const View* first_ = nullptr;
  const char* table_ = nullptr;  // of the coefficients
  int64_t table_bytes_ = 0;
  PyObject* like_ = nullptr;
  py::object siblings_, device_;
  std::vector<float> rounded_;

  Latent refused(const char* name) { return require(false, name), Latent{}; }
  bool view(PyObject* x, View& out, const char* name) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (type != torch.tensor && type != torch.parameter) return false;
    try {
      view_of(x, out);
      // Its values may be those in memory with the other sign, which DLPack does not tell.
      if (checked(PyObject_CallOneArg(torch.is_neg, x)).ptr() != Py_False) return false;
    } catch (const py::error_already_set&) {
      if (explains_) throw;
      return false;
    }
    if (out.device.type != torch.served || (first_ && out.device.index != first_->device.index)) return false;
    if (out.ndim > 0 && !out.strides) return false;
    // Without memory the address is null, or an offset from it: no system maps the lowest 64 KiB.
    if (reinterpret_cast<uintptr_t>(out.data) >= 65536) return true;
    if (std::find(out.shape, out.shape + out.ndim, 0) != out.shape + out.ndim) return true;
    return refuse<py::value_error>(std::string(name) + ": expected a tensor with memory, got freed storage, or none"), false;
  }
  // On a device values are looked at by Python alone, where FLOWKERN_DEBUG=1 asks for it.
  void check_range(const int64_t* index, int64_t batch, int64_t count, const char* name) {
    if (!torch.reads_values) return require(!index || is_checked_ || !is_debugging(), name);
    for (int64_t b = 0; index && b < batch; ++b)
      if (index[b] < 0 || index[b] >= count)
        return refuse<py::index_error>(name + (": expected values in [0, " + std::to_string(count)) + "), got " + std::to_string(index[b]));
  }
};
