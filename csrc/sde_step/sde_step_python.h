// The step as functions of Python's (verbs.h).
#pragma once

#include "../common/loss_python.h"
#include "sde_step.h"

namespace {

// What draw, replay and gradient share. x_next is read elsewhere where it is written.
void read_step(Reader& read, StepArguments& s, PyObject* x_t, PyObject* velocity, PyObject* edges, PyObject* velocity_uncond,
               PyObject* guidance_scale, int& num_history) {
  s.x_t = read.first_latent(x_t, s.batch, "x_t");
  s.velocity = read.latent(velocity, s.batch, "velocity");
  s.velocity_uncond = read.optional_latent(velocity_uncond, s.batch, "velocity_uncond");
  s.guidance_scale = float(read.guidance(guidance_scale, velocity_uncond));
  s.edges = read.coefficients(edges, s.batch, s.edge_stride, num_history);
  s.size = read.size;
  read.require(s.batch * s.size > 0, "x_t");
}

// What a dtype of torch is; of those that latents have.
Element latent_element(PyObject* dtype, Reader& read, const char* name) {
  Element element = Element::float32;
  while (element < Element::float64 && torch.dtypes[int(element)] != dtype) element = Element(int(element) + 1);
  read.require(element < Element::float64, name);
  return element;
}

// What it made of the arguments of a draw, of a mean (as x0 below) and of what x_next is rounded through.
template <class Kernel>
std::vector<py::object> draw(Given<14> given, PyObject* mean, PyObject* round_dtype, Kernel kernel, Reader& read) {
  const auto& [x_t, velocity, edges, velocity_uncond, guidance_scale, history, noise, seed, sample_id, step, x_next, dtype, log_prob, x0] =
      given;
  StepArguments s{};
  int needed = 0;
  read_step(read, s, x_t, velocity, edges, velocity_uncond, guidance_scale, needed);
  const bool is_list = PyTuple_CheckExact(history) || PyList_CheckExact(history);
  const Py_ssize_t count = is_list ? PySequence_Fast_GET_SIZE(history) : -1;
  read.require(needed <= count && count <= 3, "history");
  for (Py_ssize_t j = 0; read.serves && j < count; ++j)
    s.history[s.num_history++] = read.latent(PySequence_Fast_GET_ITEM(history, j), s.batch, "history");
  s.key = read.noise(noise, seed, sample_id, step, s.batch, kStep, s.noise);
  read.require(log_prob != Py_True || is_given(noise) || is_given(sample_id), "noise");
  Element stored = is_given(dtype) ? latent_element(dtype, read, "out_dtype") : Element(s.x_t.dtype);
  if (is_given(x_next)) {
    s.x_next = read.output(x_next, s.batch, "out", {s.x_t.data, s.velocity.data, s.noise.data}, s.key);
    read.require(!is_given(dtype) || Element(s.x_next.dtype) == stored, "out_dtype");
    stored = Element(s.x_next.dtype);
  }
  if (is_given(round_dtype)) {
    const Element rounded = latent_element(round_dtype, read, "round_dtype");
    read.require(stored == Element::float32 || stored == rounded, "round_dtype");
    if (stored == Element::float32) s.rounded = DType(rounded);
  }
  if (!PyBool_Check(log_prob)) s.log_prob = read.optional_vector<float>(log_prob, s.batch, "log_prob");
  if (!PyBool_Check(x0) && is_given(x0)) s.x0 = read.output(x0, s.batch, "x0", {}, s.key);
  if (!PyBool_Check(mean) && is_given(mean)) s.mean = read.output(mean, s.batch, "mean", {}, s.key);
  read.require(s.mean.dtype == DType::float32, "mean");
  if (!read.serves) return {};

  const View& like = read.first();
  std::vector<py::object> results;
  for (PyObject* const result : {x_next, log_prob, x0, mean}) results.push_back(py::reinterpret_borrow<py::object>(result));
  const auto latent = [&](py::object& result, Element element) {
    const Made made = make(read, like.shape, like.ndim, element);
    result = made.tensor;
    return Latent{made.data, s.size, DType(element)};
  };
  if (!s.x_next.data) s.x_next = latent(results[0], stored);
  if (log_prob == Py_True) {
    const Made made = make(read, &s.batch, 1, Element::float32);
    results[1] = made.tensor, s.log_prob = floats(made);
  }
  if (x0 == Py_True) s.x0 = latent(results[2], stored);
  if (mean == Py_True) s.mean = latent(results[3], Element::float32);
  run(kernel, s, read);
  return results;
}

namespace functions {

// x_next: a tensor to write, or None, and its dtype then, or None; log_prob, x0: a tensor to write, or whether it is wanted.
// Returns (x_next, log_prob, x0).
py::object sde_draw(Given<14> given, Reader& read) {
  const auto made = draw(given, Py_None, Py_None, kernels.sde_draw, read);
  return made.empty() ? py::object(py::none()) : py::make_tuple(made[0], made[1], made[2]);
}

// With a mean, as x0 is given, and a dtype that x_next is rounded through, or None. Returns (x_next, log_prob, x0, mean).
py::object sde_draw_mean(Given<16> given, Reader& read) {
  const auto made = draw(part<0, 14>(given), given[14], given[15], kernels.sde_draw_mean, read);
  return made.empty() ? py::object(py::none()) : py::make_tuple(made[0], made[1], made[2], made[3]);
}

// records: whether gradients are recorded. Returns (log_prob, the residual where it is worth keeping).
py::object sde_replay(Given<7> given, Reader& read) {
  const auto& [x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, records] = given;
  StepArguments s{};
  int needed = 0;
  read_step(read, s, x_t, velocity, edges, velocity_uncond, guidance_scale, needed);
  s.x_next = read.latent(x_next, s.batch, "x_next");
  read.require(needed == 0, "edges");
  if (!read.serves) return py::none();
  const Made log_prob = make(read, &s.batch, 1, Element::float32);
  s.log_prob = floats(log_prob);
  py::object residual = py::none();
  if (keeps_residual(records, velocity, nullptr, s.velocity.dtype)) residual = make_like_first(read, DType::float32, s.residual).tensor;
  run(kernels.sde_replay, s, read);
  return py::make_tuple(log_prob.tensor, residual);
}

// Returns (log_prob, mean).
py::object sde_replay_mean(Given<6> given, Reader& read) {
  const auto& [x_t, velocity, x_next, edges, velocity_uncond, guidance_scale] = given;
  StepArguments s{};
  int needed = 0;
  read_step(read, s, x_t, velocity, edges, velocity_uncond, guidance_scale, needed);
  s.x_next = read.latent(x_next, s.batch, "x_next");
  read.require(needed == 0, "edges");
  if (!read.serves) return py::none();
  const Made log_prob = make(read, &s.batch, 1, Element::float32), mean = make_like_first(read, DType::float32, s.mean);
  s.log_prob = floats(log_prob);
  run(kernels.sde_replay_mean, s, read);
  return py::make_tuple(log_prob.tensor, mean.tensor);
}

// residual: what sde_replay kept, or None. Returns the gradient of velocity, in that residual's memory.
py::object sde_replay_backward(Given<8> given, Reader& read) {
  const auto& [grad, x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, residual] = given;
  StepArguments s{};
  int needed = 0;
  read_step(read, s, x_t, velocity, edges, velocity_uncond, guidance_scale, needed);
  s.x_next = read.latent(x_next, s.batch, "x_next");
  s.grad_out = read.gradient(grad, s.batch, s.grad_stride);
  s.residual = read.kept(residual, s.batch, nullptr);
  if (!read.serves) return py::none();
  py::object gradient = py::reinterpret_borrow<py::object>(residual);
  if (!s.residual.data) gradient = make_like_first(read, s.velocity.dtype, s.grad).tensor;
  run(kernels.sde_replay_backward, s, read);
  return gradient;
}

// The gradient of a velocity of that dtype, from the gradients of log_prob and mean, one of which may be None. scale: of the velocity in
// the guided one.
py::object sde_mean_backward(Given<7> given, Reader& read) {
  const auto& [mean, x_next, grad, grad_mean, edges, scale, dtype] = given;
  StepArguments s{};
  int needed = 0;
  s.mean = read.first_latent(mean, s.batch, "mean");
  s.x_next = read.latent(x_next, s.batch, "x_next");
  s.grad_mean = read.optional_latent(grad_mean, s.batch, "grad");
  if (is_given(grad)) s.grad_out = read.gradient(grad, s.batch, s.grad_stride);
  s.edges = read.coefficients(edges, s.batch, s.edge_stride, needed);
  s.guidance_scale = float(read.number(scale, "guidance_scale"));
  s.size = read.size;
  const Element element = latent_element(dtype, read, "velocity");
  read.require(s.mean.dtype == DType::float32 && s.batch * s.size > 0, "mean");
  read.require((s.grad_out || s.grad_mean.data) && s.grad_mean.dtype == DType::float32, "grad");
  if (!read.serves) return py::none();
  const Made gradient = make_like_first(read, DType(element), s.grad);
  run(kernels.sde_mean_backward, s, read);
  return gradient.tensor;
}

// Writes standard normals to out, and returns it.
py::object fill_philox(Given<5> given, Reader& read) {
  const auto& [out, seed, sample_id, step, stream] = given;
  NormalArguments n{};
  const Latent latent = read.first_latent(out, n.batch, "out");
  n.key = read.key(seed, sample_id, step, n.batch, uint32_t(read.integer(stream, 0, 15, "stream")));
  read.require(read.serves && read.first().is_packed(0) && latent.dtype == DType::float32, "out");
  if (!read.serves) return py::none();
  n.size = read.size;
  n.out = reinterpret_cast<float*>(latent.data);
  run(kernels.fill_philox, n, read);
  return py::reinterpret_borrow<py::object>(out);
}

}  // namespace functions
}  // namespace
