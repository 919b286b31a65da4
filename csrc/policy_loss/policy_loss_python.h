// The policy loss as functions of Python's (verbs.h).
#pragma once

#include "../common/loss_python.h"
#include "policy_loss.h"

namespace {

const std::initializer_list<const char*> kRatios = {"sde", "guard"};

constexpr size_t kPolicyInputs = 21;  // flowkern.ops.policy_loss

// What both passes take. x_next, or else the noise that it is drawn again with.
void read_policy(Reader& read, PolicyArguments& p, Given<kPolicyInputs> inputs) {
  const auto& [velocity, x_t, x_next, c_rows, advantage, row, old_velocity, old_log_prob, noise, seed, sample_id, step, velocity_uncond,
               guidance_scale, velocity_ref, kl_coef, step_weight, clip_low, clip_high, ratio, reduction] = inputs;
  int num_history = 0;
  p.velocity = read.first_latent(velocity, p.rows, "velocity");
  read.row(row, p);
  p.size = read.size;
  p.x_t = read.latent(x_t, p.rows, "x_t");
  p.x_next = read.optional_latent(x_next, p.batch, "x_next");
  p.old_velocity = read.optional_latent(old_velocity, p.rows, "old_velocity");
  p.velocity_uncond = read.optional_latent(velocity_uncond, p.rows, "velocity_uncond");
  p.velocity_ref = read.optional_latent(velocity_ref, p.rows, "velocity_ref");
  p.guidance_scale = float(read.guidance(guidance_scale, velocity_uncond));
  p.edges = read.coefficients(c_rows, p.batch, p.edge_stride, num_history);
  read.require(num_history == 0, "edges");
  p.key = read.noise(noise, seed, sample_id, step, p.batch, kStep, p.noise);
  const bool is_drawn = is_given(noise) || is_given(sample_id);
  read.require(is_given(x_next) ? !is_drawn : is_drawn && is_given(old_velocity) && p.x_t.dtype == DType::float32, "x_next");
  p.settings.guard = read.choice(ratio, kRatios, "ratio");
}

namespace functions {

// flowkern.policy_loss's arguments, but for backend; then whether gradients are recorded. Returns the fields of PolicyLoss, slopes
// (batch, 2), and the residual where it is worth keeping.
py::object policy_forward(Given<kPolicyInputs + 1> given, Reader& read) {
  const auto& [velocity, x_t, x_next, c_rows, advantage, row, old_velocity, old_log_prob, noise, seed, sample_id, step, velocity_uncond,
               guidance_scale, velocity_ref, kl_coef, step_weight, clip_low, clip_high, ratio, reduction, records] = given;
  PolicyArguments p{};
  read_policy(read, p, part<0, kPolicyInputs>(given));
  p.advantage = read.vector<const float>(advantage, p.batch, "advantage");
  p.old_log_prob = read.optional_vector<const float>(old_log_prob, p.batch, "old_log_prob");
  if (PyFloat_CheckExact(kl_coef) || PyLong_CheckExact(kl_coef)) {
    p.kl_value = float(read.coefficient(kl_coef, velocity_ref, "kl_coef"));
  } else {
    p.kl_coef = read.vector<const float>(kl_coef, p.batch, "kl_coef");
    read.require(is_given(velocity_ref), "velocity_ref");
  }
  p.step_weight = read.optional_vector<const float>(step_weight, p.batch, "step_weight");
  const double low = read.number(clip_low, 0, 1, "clip_low"), high = read.number(clip_high, 0, HUGE_VAL, "clip_high");
  read.require(low < 1, "clip_low");
  p.reduction = Reduction(read.choice(reduction, kReductions, "reduction"));
  const bool guard = p.settings.guard;
  read.require(!is_given(old_log_prob) || !(is_given(old_velocity) || guard), "old_log_prob");
  if (!read.serves) return py::none();

  const Ratio sums = guard ? Ratio::guard : Ratio::sde;
  const Ratio kind = is_given(old_log_prob) ? Ratio::recorded : p.old_velocity.data ? sums : Ratio::on_policy;
  if (kind == Ratio::on_policy) p.x_t = p.x_next = {};  // the log-ratio needs no data
  const double share = p.reduction == Reduction::mean && p.batch > 0 ? 1.0 / double(p.batch) : 1.0;
  p.settings = policy_settings(kind, guard, low, high, share, p.guidance_scale, p.size);
  LossResult<3, 2> result(read, p.batch, reduction, p.reduction != Reduction::none);
  if (kind != Ratio::on_policy && keeps_residual(records, velocity, p.row, p.velocity.dtype)) p.residual = result.keep(read);
  p.loss = floats(result.loss);
  p.log_ratio = floats(result.values[0]);
  p.ratio = floats(result.values[1]);
  p.kl = floats(result.values[2]);
  p.clipped_low = reinterpret_cast<bool*>(result.clipped_low.data);
  p.clipped_high = reinterpret_cast<bool*>(result.clipped_high.data);
  p.slopes = floats(result.slopes);
  run(kernels.policy_forward, p, read);
  return result.tuple();
}

// grad, slopes; what policy_forward takes, of which what it alone reads is not looked at; the residual that it kept, or None. Returns
// the gradient of velocity, in that residual's memory.
py::object policy_backward(Given<kPolicyInputs + 3> given, Reader& read) {
  const auto& [grad, slopes] = part<0, 2>(given);
  const auto& [residual] = part<2 + kPolicyInputs, 1>(given);
  PolicyArguments p{};
  read_policy(read, p, part<2, kPolicyInputs>(given));
  p.grad = read.gradient(grad, p.batch, p.grad_stride);
  p.slopes = read.vector<float>(slopes, p.batch, "slopes", 2);
  p.residual = read.kept(residual, p.rows, p.row);
  return read.serves ? gradient_of(kernels.policy_backward, p, residual, read) : py::none();
}

}  // namespace functions
}  // namespace
