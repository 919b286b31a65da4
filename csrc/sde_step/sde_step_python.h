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

namespace functions {

// x_next: a tensor to write, or None, and its dtype then, or None; log_prob, x0: a tensor to write, or whether it is wanted.
// Returns (x_next, log_prob, x0).
py::object sde_draw(Given<14> given, Reader& read) {
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
  Element stored = Element(s.x_t.dtype);
  if (is_given(dtype)) {
    for (stored = Element::float32; stored < Element::float64 && torch.dtypes[int(stored)] != dtype;) stored = Element(int(stored) + 1);
    read.require(stored < Element::float64, "out_dtype");
  }
  if (is_given(x_next)) {
    s.x_next = read.output(x_next, s.batch, "out", {s.x_t.data, s.velocity.data, s.noise.data}, s.key);
    read.require(!is_given(dtype) || Element(s.x_next.dtype) == stored, "out_dtype");
    stored = Element(s.x_next.dtype);
  }
  const bool makes_log_prob = PyBool_Check(log_prob), makes_x0 = PyBool_Check(x0);
  if (!makes_log_prob) s.log_prob = read.optional_vector<float>(log_prob, s.batch, "log_prob");
  if (!makes_x0 && is_given(x0)) s.x0 = read.output(x0, s.batch, "x0", {}, s.key);
  if (!read.serves) return py::none();

  const View& like = read.first();
  Made made[3] = {{py::reinterpret_borrow<py::object>(x_next), nullptr},
                  {py::reinterpret_borrow<py::object>(log_prob), nullptr},
                  {py::reinterpret_borrow<py::object>(x0), nullptr}};
  if (!s.x_next.data) made[0] = make(read, like.shape, like.ndim, stored), s.x_next = {made[0].data, s.size, DType(stored)};
  if (log_prob == Py_True) made[1] = make(read, &s.batch, 1, Element::float32), s.log_prob = floats(made[1]);
  if (x0 == Py_True) made[2] = make(read, like.shape, like.ndim, stored), s.x0 = {made[2].data, s.size, DType(stored)};
  run(kernels.sde_draw, s, read);
  return py::make_tuple(made[0].tensor, made[1].tensor, made[2].tensor);
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
