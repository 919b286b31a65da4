// The token loss as functions of Python's (verbs.h). What they write is given, as flowkern.ops.token_loss walks chunk by chunk; they
// return True.
#pragma once

#include "../common/function.h"
#include "token_loss.h"

namespace {

constexpr size_t kTokenInputs = 5;

// logits (n, V), each row contiguous, ids and exact (n,), or None where the logits are float32; temperature; softcap, 0 for none.
void read_tokens(Reader& read, TokenArguments& t, Given<kTokenInputs> inputs) {
  const auto& [logits, ids, exact, temperature, softcap] = inputs;
  t.logits = read.first_latent(logits, t.rows, "logits");
  t.size = read.size;
  t.ids = read.vector<const int64_t>(ids, t.rows, "ids");
  t.exact = read.optional_vector<const float>(exact, t.rows, "exact");
  t.temperature = float(read.number(temperature, 0, HUGE_VAL, "temperature"));
  t.cap = float(read.number(softcap, 0, HUGE_VAL, "softcap"));
  read.require(t.temperature > 0, "temperature");
  for (int64_t row = 0; read.serves && row < t.rows; ++row)
    if (t.ids[row] < 0 || t.ids[row] >= t.size) read.require(false, "ids");
}

namespace functions {

// The inputs; flowkern.ops.token_loss.inputs.Tokens from old_log_prob on; Objective; Statistics; whether a gradient is wanted.
py::object token_policy(Given<kTokenInputs + 18> given, Reader& read) {
  const auto& [old, advantage, weight, ref, sample] = part<kTokenInputs, 5>(given);
  const auto& [kl_coef, entropy_coef, log_low, log_high, log_dual, is_cap] = part<kTokenInputs + 5, 6>(given);
  const auto& [log_prob, ratio, kl, entropy, loss, clipped, wants_gradient] = part<kTokenInputs + 11, 7>(given);
  TokenArguments t{};
  read_tokens(read, t, part<0, kTokenInputs>(given));
  t.old = read.optional_vector<const float>(old, t.rows, "old_log_prob");
  t.advantage = read.vector<const float>(advantage, t.rows, "advantage");
  t.weight = read.vector<const float>(weight, t.rows, "token_weight");
  t.ref = read.optional_vector<const float>(ref, t.rows, "ref_log_prob");
  t.sample = read.optional_vector<const float>(sample, t.rows, "sample_log_prob");
  t.objective = {read.number(kl_coef, "kl_coef"),    read.number(entropy_coef, "entropy_coef"), read.number(log_low, "clip_low"),
                 read.number(log_high, "clip_high"), read.number(log_dual, "dual_clip"),        read.number(is_cap, "is_cap")};
  t.log_prob = read.vector<float>(log_prob, t.rows, "log_prob");
  t.ratio = read.vector<float>(ratio, t.rows, "ratio");
  t.kl = read.vector<float>(kl, t.rows, "kl");
  t.entropy = read.vector<float>(entropy, t.rows, "entropy");
  t.loss = read.vector<float>(loss, t.rows, "loss");
  t.clipped = read.vector<bool>(clipped, t.rows, "clipped");
  t.wants_gradient = wants_gradient == Py_True;
  if (!read.serves) return py::none();
  run(kernels.token_policy, t, read);
  return py::bool_(true);
}

// The inputs; log_prob, and what token_gradient reads of the same logits: (n,) each, to write.
py::object token_log_prob(Given<kTokenInputs + 3> given, Reader& read) {
  const auto& [log_prob, largest, log_total] = part<kTokenInputs, 3>(given);
  TokenArguments t{};
  read_tokens(read, t, part<0, kTokenInputs>(given));
  t.log_prob = read.vector<float>(log_prob, t.rows, "log_prob");
  t.largest = read.vector<float>(largest, t.rows, "largest");
  t.log_total = read.vector<float>(log_total, t.rows, "log_total");
  if (!read.serves) return py::none();
  run(kernels.token_log_prob, t, read);
  return py::bool_(true);
}

// The inputs, what token_log_prob has written, and the gradient (n,) of the log-probabilities.
py::object token_gradient(Given<kTokenInputs + 3> given, Reader& read) {
  const auto& [largest, log_total, grad] = part<kTokenInputs, 3>(given);
  TokenArguments t{};
  read_tokens(read, t, part<0, kTokenInputs>(given));
  t.largest = read.vector<float>(largest, t.rows, "largest");
  t.log_total = read.vector<float>(log_total, t.rows, "log_total");
  t.grad = read.vector<const float>(grad, t.rows, "grad");
  if (!read.serves) return py::none();
  run(kernels.token_gradient, t, read);
  return py::bool_(true);
}

}  // namespace functions
}  // namespace
