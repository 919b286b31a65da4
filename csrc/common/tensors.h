// Tensors as kernels see them, without a torch to build against: through DLPack's C exchange API, which gives address, shape, strides
// and dtype in one call of torch's and allocates nothing; through their attributes where torch is older than that.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace py = pybind11;

// The layouts of DLPack, major version 1 (https://dmlc.github.io/dlpack), as far as they are used here.
namespace dlpack {
constexpr int32_t kCpu = 1, kCuda = 2;
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // of an older version
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, Tensor* out);  // borrows; 0, or -1 and a Python error
  void* stream;
};
}  // namespace dlpack

// What is asked of torch, handed over once by flowkern.ops._common.native.
struct Torch {
  PyObject *tensor, *parameter, *coefficients;  // types; subclasses may hide that there is no memory
  PyObject *empty, *is_neg, *num_history, *table, *requires_grad, *device;
  PyObject* get_num_threads;                             // for the CPU
  PyObject *stream, *scratch, *siblings, *loss_outputs;  // for a device: see flowkern.ops._common.native_cuda
  PyObject* dtypes[6];                                   // of Element
  int32_t served;                                        // the device type of DLPack that tensors have to be on
  bool reads_values;                                     // whether the host can: on the CPU
  const dlpack::ExchangeApi* exchange;
};
inline Torch torch{};

enum class Element : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3, int64 = 4, boolean = 5, other = 6 };

struct View : dlpack::Tensor {
  std::vector<int64_t> kept;  // shape and strides, where torch does not lend its own

  Element element() const {
    if (dtype.lanes != 1) return Element::other;
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return Element::bfloat16;
    if (dtype.code == dlpack::kInt && dtype.bits == 64) return Element::int64;
    if (dtype.code == dlpack::kBool && dtype.bits == 8) return Element::boolean;
    if (dtype.code != dlpack::kFloat) return Element::other;
    return dtype.bits == 32 ? Element::float32 : dtype.bits == 16 ? Element::float16 : dtype.bits == 64 ? Element::float64 : Element::other;
  }
  // Elements from dimension `first` on lie one after the other.
  bool is_packed(int first) const {
    int64_t expected = 1;
    bool is_dense = true;
    for (int d = ndim - 1; d >= first; --d) {
      is_dense &= shape[d] == 1 || strides[d] == expected;
      expected *= shape[d];
    }
    return is_dense || expected == 0;
  }
  template <class T>
  T* at() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
};

inline bool is_debugging() {
  const char* debug = std::getenv("FLOWKERN_DEBUG");
  return debug && std::strcmp(debug, "1") == 0;
}

inline void view_by_attributes(PyObject* object, View& out) {
  const py::handle x(object);
  const py::tuple shape = x.attr("shape"), strides = x.attr("stride")();
  const auto dtype = x.attr("dtype");
  static constexpr dlpack::DataType kTypes[] = {{dlpack::kFloat, 32, 1}, {dlpack::kBfloat, 16, 1}, {dlpack::kFloat, 16, 1},
                                                {dlpack::kFloat, 64, 1}, {dlpack::kInt, 64, 1},    {dlpack::kBool, 8, 1}};
  out.dtype = {};
  for (int j = 0; j < 6; ++j)
    if (dtype.ptr() == torch.dtypes[j]) out.dtype = kTypes[j];
  out.data = reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
  const int32_t type = x.attr("is_cpu").cast<bool>() ? dlpack::kCpu : x.attr("is_cuda").cast<bool>() ? dlpack::kCuda : 0;
  out.device = {type, type == dlpack::kCuda ? x.attr("get_device")().cast<int32_t>() : 0};
  out.ndim = int32_t(shape.size());
  out.byte_offset = 0;
  for (const py::tuple& values : {shape, strides})
    for (const py::handle value : values) out.kept.push_back(value.cast<int64_t>());
  out.shape = out.kept.data();
  out.strides = out.kept.data() + out.ndim;
}

// What a call of Python's gave, or its error.
inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// An error where the tensor has no memory, or no strides.
inline void view_of(PyObject* x, View& out) {
  if (!torch.exchange) return view_by_attributes(x, out);
  if (torch.exchange->view(x, &out) != 0) throw py::error_already_set();
}
