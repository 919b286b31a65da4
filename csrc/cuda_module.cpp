// flowkern._cuda: the CUDA kernels behind raw pointers and a stream. Shapes, dtypes and devices are checked in Python.
//
// It carries its own CUDA runtime, so it imports where there is no driver; a launch there is an exception.
#include <pybind11/pybind11.h>

#include <string>

#include "matching_loss/matching_loss_cuda.h"
#include "policy_loss/policy_loss_cuda.h"
#include "sde_step/sde_step_cuda.h"

namespace py = pybind11;

namespace {

// A latent arrives as (address, stride in elements, dtype code), or None.
Latent latent(const py::object& packed) {
  if (packed.is_none()) return {};
  const auto fields = py::reinterpret_borrow<py::tuple>(packed);
  return {reinterpret_cast<char*>(fields[0].cast<uintptr_t>()), fields[1].cast<int64_t>(), DType(fields[2].cast<int>())};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A Philox key arrives as (seed, address of sample_id, address of step, step_value, stream); addresses may be 0.
NoiseKey noise_key(const py::tuple& packed) {
  return {packed[0].cast<uint64_t>(), pointer<const int64_t>(packed[1].cast<uintptr_t>()),
          pointer<const int64_t>(packed[2].cast<uintptr_t>()), packed[3].cast<int64_t>(), packed[4].cast<uint32_t>()};
}

// Where to run arrives as (device, stream); scratch memory as (partial, arrivals).
Queue queue_of(const py::tuple& packed) { return {packed[0].cast<int>(), packed[1].cast<uintptr_t>()}; }

Scratch scratch_of(const py::tuple& packed) {
  return {pointer<float>(packed[0].cast<uintptr_t>()), pointer<int>(packed[1].cast<uintptr_t>())};
}

template <class T, size_t count>
void set_addresses(T** const (&fields)[count], const py::tuple& packed, size_t first = 0) {
  for (size_t j = 0; j < count; ++j) *fields[j] = pointer<T>(packed[first + j].cast<uintptr_t>());
}

template <size_t count>
void set_latents(Latent* const (&fields)[count], const py::tuple& packed) {
  for (size_t j = 0; j < count; ++j) *fields[j] = latent(packed[j]);
}

// What all kernels of the step take.
//   latents: x_t, velocity, x_next, velocity_uncond
StepArguments step_arguments(int64_t batch, int64_t size, const py::tuple& latents, float guidance_scale, uintptr_t rows,
                             int64_t row_stride) {
  StepArguments s{};
  s.batch = batch;
  s.size = size;
  set_latents({&s.x_t, &s.velocity, &s.x_next, &s.velocity_uncond}, latents);
  s.guidance_scale = guidance_scale;
  s.rows = pointer<const float>(rows);
  s.row_stride = row_stride;
  return s;
}

void draw(py::tuple queue, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t rows, int64_t row_stride,
          py::object noise, py::object x0, py::tuple history, py::tuple key, uintptr_t log_prob, py::tuple scratch) {
  StepArguments s = step_arguments(batch, size, latents, guidance_scale, rows, row_stride);
  s.noise = latent(noise);
  s.x0 = latent(x0);
  s.num_history = int(history.size());
  for (int j = 0; j < s.num_history; ++j) s.history[j] = latent(history[j]);
  s.key = noise_key(key);
  s.log_prob = pointer<float>(log_prob);
  s.scratch = scratch_of(scratch);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  sde_draw(s, on);
}

void replay(py::tuple queue, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t rows, int64_t row_stride,
            uintptr_t log_prob, py::tuple scratch) {
  StepArguments s = step_arguments(batch, size, latents, guidance_scale, rows, row_stride);
  s.log_prob = pointer<float>(log_prob);
  s.scratch = scratch_of(scratch);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  sde_replay(s, on);
}

void replay_backward(py::tuple queue, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t rows,
                     int64_t row_stride, uintptr_t grad_out, py::object grad) {
  StepArguments s = step_arguments(batch, size, latents, guidance_scale, rows, row_stride);
  s.grad_out = pointer<const float>(grad_out);
  s.grad = latent(grad);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  sde_replay_backward(s, on);
}

void fill(py::tuple queue, int64_t batch, int64_t size, uintptr_t out, py::tuple key) {
  const NormalArguments n = {batch, size, pointer<float>(out), noise_key(key), 0};
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  fill_philox(n, on);
}

// What both passes of the policy loss take.
//   latents: velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, noise
PolicyArguments policy_arguments(int64_t rows, int64_t batch, int64_t size, const py::tuple& latents, float guidance_scale, uintptr_t row,
                                 uintptr_t edges, int64_t edge_stride, const py::tuple& key, uintptr_t slopes) {
  PolicyArguments p{};
  p.rows = rows;
  p.batch = batch;
  p.size = size;
  set_latents({&p.velocity, &p.x_t, &p.x_next, &p.old_velocity, &p.velocity_uncond, &p.velocity_ref, &p.noise}, latents);
  p.guidance_scale = guidance_scale;
  p.row = pointer<const int64_t>(row);
  p.edges = pointer<const float>(edges);
  p.edge_stride = edge_stride;
  p.key = noise_key(key);
  p.slopes = pointer<float>(slopes);
  return p;
}

// per_sample: advantage, old_log_prob, step_weight, kl_coef; outputs: loss, log_ratio, ratio, kl, clipped_low, clipped_high
void forward_policy(py::tuple queue, int64_t rows, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t row,
                    uintptr_t edges, int64_t edge_stride, py::tuple key, uintptr_t slopes, py::tuple per_sample, float kl_value,
                    double clip_low, double clip_high, bool guard, bool is_mean, bool is_reduced, py::tuple outputs, py::tuple scratch) {
  PolicyArguments p = policy_arguments(rows, batch, size, latents, guidance_scale, row, edges, edge_stride, key, slopes);
  set_addresses({&p.advantage, &p.old_log_prob, &p.step_weight, &p.kl_coef}, per_sample);
  set_addresses({&p.loss, &p.log_ratio, &p.ratio, &p.kl}, outputs);
  set_addresses({&p.clipped_low, &p.clipped_high}, outputs, 4);
  p.kl_value = kl_value;
  p.is_reduced = is_reduced;
  p.share = is_mean ? 1.0 / double(batch) : 1.0;
  const Ratio sums = guard ? Ratio::guard : Ratio::sde;
  const Ratio ratio = p.old_log_prob ? Ratio::recorded : p.old_velocity.data ? sums : Ratio::on_policy;
  p.settings = policy_settings(ratio, guard, clip_low, clip_high, p.share, guidance_scale, size);
  p.scratch = scratch_of(scratch);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  policy_forward(p, on);
}

void backward_policy(py::tuple queue, int64_t rows, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t row,
                     uintptr_t edges, int64_t edge_stride, py::tuple key, uintptr_t slopes, uintptr_t grad, int64_t grad_stride, bool guard,
                     py::object grad_velocity) {
  PolicyArguments p = policy_arguments(rows, batch, size, latents, guidance_scale, row, edges, edge_stride, key, slopes);
  p.grad = pointer<const float>(grad);
  p.grad_stride = grad_stride;
  p.settings.guard = guard;
  p.grad_velocity = latent(grad_velocity);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  policy_backward(p, on);
}

// What both passes of the matching loss take.
//   latents: velocity, x0, old_velocity, velocity_ref, velocity_ema, noise
MatchingArguments matching_arguments(int64_t rows, int64_t batch, int64_t size, const py::tuple& latents, uintptr_t row,
                                     const py::tuple& key, uintptr_t slopes) {
  MatchingArguments m{};
  m.rows = rows;
  m.batch = batch;
  m.rule.size = size;
  set_latents({&m.velocity, &m.x0, &m.old_velocity, &m.ref, &m.ema, &m.noise}, latents);
  m.row = pointer<const int64_t>(row);
  m.key = noise_key(key);
  m.slopes = pointer<float>(slopes);
  return m;
}

// outputs: loss, log_ratio, ratio, matching, ref, ema, clipped_low, clipped_high
void forward_matching(py::tuple queue, int64_t rows, int64_t batch, int64_t size, py::tuple latents, uintptr_t row, py::tuple key,
                      uintptr_t slopes, uintptr_t sigma, uintptr_t advantage, bool nft, int weighting, double ref_coef, double ema_coef,
                      double clip_low, double clip_high, bool is_mean, bool is_reduced, py::tuple outputs, py::tuple scratch) {
  MatchingArguments m = matching_arguments(rows, batch, size, latents, row, key, slopes);
  m.sigma = pointer<const float>(sigma);
  m.advantage = pointer<const float>(advantage);
  const double share = is_mean ? 1.0 / double(batch) : 1.0;
  m.rule = {size, nft, m.old_velocity.data != nullptr, weighting, ref_coef, ema_coef, clip_low, clip_high, share};
  m.is_reduced = is_reduced;
  set_addresses({&m.loss, &m.log_ratio, &m.ratio, &m.matching, &m.ref_mean, &m.ema_mean}, outputs);
  set_addresses({&m.clipped_low, &m.clipped_high}, outputs, 6);
  m.scratch = scratch_of(scratch);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  matching_forward(m, on);
}

void backward_matching(py::tuple queue, int64_t rows, int64_t batch, int64_t size, py::tuple latents, uintptr_t row, py::tuple key,
                       uintptr_t slopes, uintptr_t grad, int64_t grad_stride, py::object grad_velocity) {
  MatchingArguments m = matching_arguments(rows, batch, size, latents, row, key, slopes);
  m.grad = pointer<const float>(grad);
  m.grad_stride = grad_stride;
  m.grad_velocity = latent(grad_velocity);
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  matching_backward(m, on);
}

void noise_samples(py::tuple queue, int64_t batch, int64_t size, py::object x0, py::object noise, py::object out, py::tuple key,
                   uintptr_t sigma) {
  const NoisingArguments n = {batch, size, latent(x0), latent(noise), latent(out), noise_key(key), pointer<const float>(sigma), 0, false};
  const Queue on = queue_of(queue);
  py::gil_scoped_release release;
  add_noise(n, on);
}

std::string why_not(int device) {
  for (const auto op : {step_why_not, policy_why_not, matching_why_not}) {
    const std::string reason = op(device);
    if (!reason.empty()) return reason;
  }
  return "";
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "flowkern's CUDA kernels; call them through flowkern.ops.";
  m.def("why_not", &why_not, "Why this build cannot run on a device; empty where it can. Loads the kernels.");
  m.def("tiles_of", &tiles_of, "The tiles that a sample of so many elements is cut into.");
  m.def("sde_draw", &draw);
  m.def("sde_replay", &replay);
  m.def("sde_replay_backward", &replay_backward);
  m.def("fill_philox", &fill);
  m.def("policy_forward", &forward_policy);
  m.def("policy_backward", &backward_policy);
  m.def("matching_forward", &forward_matching);
  m.def("matching_backward", &backward_matching);
  m.def("add_noise", &noise_samples);
  m.attr("matching_sums") = kMatchingSums;
  m.attr("policy_sums") = kPolicySums;
}
