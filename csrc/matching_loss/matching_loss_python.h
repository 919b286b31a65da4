// The matching losses, and the noising of x0, as functions of Python's (verbs.h).
#pragma once

#include "../common/loss_python.h"
#include "matching_loss.h"

namespace {

constexpr size_t kMatchingInputs = 21;  // flowkern.ops.matching_loss

// What both passes take.
void read_matching(Reader& read, MatchingArguments& m, Given<kMatchingInputs> inputs) {
  const auto& [velocity, x0, sigma, advantage, row, noise, seed, sample_id, step, objective, weighting, ghuber_power, nft_beta,
               old_velocity, velocity_ref, velocity_ema, ref_coef, ema_coef, clip_low, clip_high, reduction] = inputs;
  m.velocity = read.first_latent(velocity, m.rows, "velocity");
  read.row(row, m);
  m.rule.size = read.size;
  m.x0 = read.latent(x0, m.batch, "x0");
  m.old_velocity = read.optional_latent(old_velocity, m.rows, "old_velocity");
  m.ref = read.optional_latent(velocity_ref, m.rows, "velocity_ref");
  m.ema = read.optional_latent(velocity_ema, m.rows, "velocity_ema");
  m.key = read.noise(noise, seed, sample_id, step, m.batch, kMatch, m.noise);
  read.require(is_given(noise) || is_given(sample_id), "noise");
  m.rule.nft_beta = read.number(nft_beta, 0, HUGE_VAL, "nft_beta");
  m.rule.mix = m.old_velocity.data ? float(m.rule.nft_beta) : 1.0f;
  read.require(m.rule.nft_beta > 0 && std::isfinite(m.rule.nft_beta), "nft_beta");
}

// Of an anchor: a number, or (batch,).
double anchor_coefficient(Reader& read, PyObject* x, PyObject* anchor, int64_t batch, const float*& each, const char* name) {
  if (PyFloat_CheckExact(x) || PyLong_CheckExact(x)) return read.coefficient(x, anchor, name);
  each = read.vector<const float>(x, batch, name);
  read.require(is_given(anchor), name);
  return 0;
}

namespace functions {

// flowkern.matching_loss's arguments, but for backend, and step None where noise is given; then whether gradients are recorded. Returns
// the fields of MatchingLoss, slopes (batch, 4), and the residual where it is worth keeping.
py::object matching_forward(Given<kMatchingInputs + 1> given, Reader& read) {
  const auto& [velocity, x0, sigma, advantage, row, noise, seed, sample_id, step, objective, weighting, ghuber_power, nft_beta,
               old_velocity, velocity_ref, velocity_ema, ref_coef, ema_coef, clip_low, clip_high, reduction, records] = given;
  MatchingArguments m{};
  read_matching(read, m, part<0, kMatchingInputs>(given));
  if (PyFloat_CheckExact(sigma)) {
    m.sigma_value = float(read.number(sigma, 0, 1, "sigma"));
  } else {
    m.sigma = read.vector<const float>(sigma, m.batch, "sigma");
    read.check_fraction(m.sigma, m.batch, "sigma");
  }
  m.advantage = read.vector<const float>(advantage, m.batch, "advantage");
  const bool nft = read.choice(objective, {"awm", "nft"}, "objective");
  const int weight = nft ? read.choice(weighting, {"adaptive", "uniform"}, "weighting")
                         : read.choice(weighting, {"uniform", "t", "ghuber", "t2", "huber"}, "weighting");  // of the enums
  const double power = read.number(ghuber_power, 0.01, 1, "ghuber_power"), beta = m.rule.nft_beta;
  read.require(power == kGhuberPower || (!nft && weight == kGhuber), "ghuber_power");
  read.require(beta == 1 || nft, "nft_beta");
  const double ref = anchor_coefficient(read, ref_coef, velocity_ref, m.batch, m.ref_coef, "ref_coef");
  const double ema = anchor_coefficient(read, ema_coef, velocity_ema, m.batch, m.ema_coef, "ema_coef");
  const double low = read.number(clip_low, 0, 1, "clip_low"), high = read.number(clip_high, 0, HUGE_VAL, "clip_high");
  const Reduction reduced = Reduction(read.choice(reduction, kReductions, "reduction"));
  if (!read.serves) return py::none();

  const double share = reduced == Reduction::mean && m.batch > 0 ? 1.0 / double(m.batch) : 1.0;
  m.rule = {read.size, nft, m.old_velocity.data != nullptr, weight, power, beta, m.rule.mix, ref, ema, low, high, share};
  m.is_reduced = reduced != Reduction::none;
  LossResult<5, 4> result(read, m.batch, reduction, m.is_reduced);
  const bool is_one_residual = !(nft && m.old_velocity.data);
  if (is_one_residual && keeps_residual(records, velocity, m.row, m.velocity.dtype)) m.residual = result.keep(read);
  m.loss = floats(result.loss);
  float** const values[] = {&m.log_ratio, &m.ratio, &m.matching, &m.ref_mean, &m.ema_mean};
  for (int j = 0; j < 5; ++j) *values[j] = floats(result.values[j]);
  m.clipped_low = reinterpret_cast<bool*>(result.clipped_low.data);
  m.clipped_high = reinterpret_cast<bool*>(result.clipped_high.data);
  m.slopes = floats(result.slopes);
  run(kernels.matching_forward, m, read);
  return result.tuple();
}

// grad, slopes; what matching_forward takes, of which what it alone reads is not looked at; the residual that it kept, or None. Returns
// the gradient of velocity, in that residual's memory.
py::object matching_backward(Given<kMatchingInputs + 3> given, Reader& read) {
  const auto& [grad, slopes] = part<0, 2>(given);
  const auto& [residual] = part<2 + kMatchingInputs, 1>(given);
  MatchingArguments m{};
  read_matching(read, m, part<2, kMatchingInputs>(given));
  m.grad = read.gradient(grad, m.batch, m.grad_stride);
  m.slopes = read.vector<float>(slopes, m.batch, "slopes", 4);
  m.residual = read.kept(residual, m.rows, m.row);
  return read.serves ? gradient_of(kernels.matching_backward, m, residual, read) : py::none();
}

// sigma: (batch,). Returns x_t.
py::object add_noise(Given<6> given, Reader& read) {
  const auto& [x0, sigma, noise, seed, sample_id, step] = given;
  NoisingArguments n{};
  n.x0 = read.first_latent(x0, n.batch, "x0");
  n.size = read.size;
  n.sigma = read.vector<const float>(sigma, n.batch, "sigma");
  read.check_fraction(n.sigma, n.batch, "sigma");
  n.key = read.noise(noise, seed, sample_id, step, n.batch, kMatch, n.noise);
  read.require(is_given(noise) || is_given(sample_id), "noise");
  if (!read.serves) return py::none();
  const Made out = make_like_first(read, n.x0.dtype, n.out);
  run(kernels.add_noise, n, read);
  return out.tensor;
}

}  // namespace functions
}  // namespace
