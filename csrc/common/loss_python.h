// What the losses share as functions of Python's: what comes out of them, and the gradient.
#pragma once

#include "function.h"
#include "reduction.h"

namespace {

// What comes out of a loss for each sample: numbers, then the two bools; the loss is before them, slopes (batch, n) after. On a
// device they are cut from one allocation. Last, the residual of the velocity's shape, or None.
template <int numbers, int slopes_of_one>
struct LossResult {
  Made loss, values[numbers], clipped_low, clipped_high, slopes, residual{py::none(), nullptr};

  LossResult(Reader& read, int64_t batch, PyObject* reduction, bool is_reduced) {
    const int64_t shape[] = {batch, slopes_of_one};
    if (torch.reads_values) {
      loss = make(read, &batch, is_reduced ? 0 : 1, Element::float32);
      for (Made& value : values) value = make(read, &batch, 1, Element::float32);
      clipped_low = make(read, &batch, 1, Element::boolean);
      clipped_high = make(read, &batch, 1, Element::boolean);
      slopes = make(read, shape, 2, Element::float32);
      return;
    }
    const auto all = checked(PyObject_CallFunction(torch.loss_outputs, "LiiOO", static_cast<long long>(batch), numbers, slopes_of_one,
                                                   reduction, read.device()));
    int next = 0;
    for_each([&](Made& made) { made = made_of(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(all.ptr(), next++))); });
  }
  // What backward will multiply.
  Latent keep(Reader& read) {
    residual = make(read, read.first().shape, read.first().ndim, Element::float32);
    return {residual.data, read.size, DType::float32};
  }
  py::object tuple() {
    py::tuple all(numbers + 5);
    int next = 0;
    for_each([&](Made& made) { all[next++] = made.tensor; });
    all[next] = residual.tensor;
    return all;
  }

 private:
  template <class Body>
  void for_each(Body body) {
    body(loss);
    for (Made& value : values) body(value);
    for (Made* made : {&clipped_low, &clipped_high, &slopes}) body(*made);
  }
};

// Whether a loss keeps its residual for the backward pass; records: whether gradients are recorded.
bool keeps_residual(PyObject* records, PyObject* velocity, const int64_t* row, DType dtype) {
  return records == Py_True && Reader::requires_grad(velocity) && !row && dtype == DType::float32;
}

const std::initializer_list<const char*> kReductions = {"mean", "sum", "none"};  // of enum Reduction

// The gradient of the first latent, from a backward kernel: in the memory of the residual that the forward pass has kept, or new.
template <class Kernel, class Arguments>
py::object gradient_of(Kernel kernel, Arguments& arguments, PyObject* residual, Reader& read) {
  py::object grad = py::reinterpret_borrow<py::object>(residual);
  if (!arguments.residual.data) grad = make_like_first(read, arguments.velocity.dtype, arguments.grad_velocity).tensor;
  run(kernel, arguments, read);
  return grad;
}

}  // namespace
