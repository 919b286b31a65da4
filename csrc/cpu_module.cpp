// flowkern._cpu: the CPU kernels behind raw pointers, so one build serves every torch. Shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>

#include <string>

#include "matching_loss/matching_loss_cpu.h"
#include "policy_loss/policy_loss_cpu.h"
#include "sde_step/sde_step_cpu.h"

namespace py = pybind11;

namespace {

struct Kernels {
  const char* isa;
  void (*draw)(const StepArguments&);
  void (*replay)(const StepArguments&);
  void (*replay_backward)(const StepArguments&);
  void (*fill_philox)(const NormalArguments&);
  void (*policy_forward)(const PolicyArguments&);
  void (*policy_backward)(const PolicyArguments&);
  void (*matching_forward)(const MatchingArguments&);
  void (*matching_backward)(const MatchingArguments&);
  void (*add_noise)(const NoisingArguments&);
};

#define FK_KERNELS(isa)                                                        \
  {#isa,                                                                       \
   isa::sde_draw, isa::sde_replay, isa::sde_replay_backward, isa::fill_philox, \
   isa::policy_forward, isa::policy_backward,                                  \
   isa::matching_forward, isa::matching_backward, isa::add_noise}

// The widest instance that this processor can run.
Kernels choose_kernels() {
#if defined(FK_X86_INSTANCES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return FK_KERNELS(avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return FK_KERNELS(avx2);
#endif
  return FK_KERNELS(baseline);
}

Kernels kernels = choose_kernels();

void use_isa(const std::string& isa) {
  const Kernels widest = choose_kernels();
  if (isa == "baseline") kernels = FK_KERNELS(baseline);
#if defined(FK_X86_INSTANCES)
  else if (isa == "avx2" && std::string(widest.isa) != "baseline") kernels = FK_KERNELS(avx2);
  else if (isa == "avx512" && std::string(widest.isa) == "avx512") kernels = FK_KERNELS(avx512);
#endif
  else throw py::value_error("isa: this build and processor serve up to '" + std::string(widest.isa) + "', got '" + isa + "'");
}

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

// The velocity row of each sample, by address: an index out of range would write past the gradient.
const int64_t* checked_row(uintptr_t address, int64_t batch, int64_t rows) {
  const int64_t* row = pointer<const int64_t>(address);
  for (int64_t b = 0; row && b < batch; ++b)
    if (row[b] < 0 || row[b] >= rows)
      throw py::index_error("row: expected values in [0, " + std::to_string(rows) + "), got " + std::to_string(row[b]));
  return row;
}

StepArguments step_arguments(int64_t batch, int64_t size, const py::object& x_t, const py::object& velocity, const py::object& x_next,
                             const py::object& velocity_uncond, float guidance_scale, uintptr_t rows, int64_t row_stride, int threads) {
  StepArguments s{};
  s.batch = batch;
  s.size = size;
  s.x_t = latent(x_t);
  s.velocity = latent(velocity);
  s.x_next = latent(x_next);
  s.velocity_uncond = latent(velocity_uncond);
  s.guidance_scale = guidance_scale;
  s.rows = pointer<const float>(rows);
  s.row_stride = row_stride;
  s.threads = threads;
  return s;
}

void sde_draw(int64_t batch, int64_t size, py::object x_t, py::object velocity, py::object x_next, py::object velocity_uncond,
              float guidance_scale, uintptr_t rows, int64_t row_stride, int threads, py::object noise, py::object x0, py::tuple history,
              uint64_t seed, uintptr_t sample_id, uintptr_t step, int64_t step_value, uint32_t stream, uintptr_t log_prob) {
  StepArguments s = step_arguments(batch, size, x_t, velocity, x_next, velocity_uncond, guidance_scale, rows, row_stride, threads);
  s.noise = latent(noise);
  s.x0 = latent(x0);
  s.num_history = int(history.size());
  for (int j = 0; j < s.num_history; ++j) s.history[j] = latent(history[j]);
  s.key = {seed, pointer<const int64_t>(sample_id), pointer<const int64_t>(step), step_value, stream};
  s.log_prob = pointer<float>(log_prob);
  py::gil_scoped_release release;
  kernels.draw(s);
}

void sde_replay(int64_t batch, int64_t size, py::object x_t, py::object velocity, py::object x_next, py::object velocity_uncond,
                float guidance_scale, uintptr_t rows, int64_t row_stride, int threads, uintptr_t log_prob) {
  StepArguments s = step_arguments(batch, size, x_t, velocity, x_next, velocity_uncond, guidance_scale, rows, row_stride, threads);
  s.log_prob = pointer<float>(log_prob);
  py::gil_scoped_release release;
  kernels.replay(s);
}

void sde_replay_backward(int64_t batch, int64_t size, py::object x_t, py::object velocity, py::object x_next, py::object velocity_uncond,
                         float guidance_scale, uintptr_t rows, int64_t row_stride, int threads, uintptr_t grad_out, py::object grad) {
  StepArguments s = step_arguments(batch, size, x_t, velocity, x_next, velocity_uncond, guidance_scale, rows, row_stride, threads);
  s.grad_out = pointer<const float>(grad_out);
  s.grad = latent(grad);
  py::gil_scoped_release release;
  kernels.replay_backward(s);
}

void fill_philox(int64_t batch, int64_t size, uintptr_t out, uint64_t seed, uintptr_t sample_id, uintptr_t step, int64_t step_value,
                 uint32_t stream, int threads) {
  const NoiseKey key{seed, pointer<const int64_t>(sample_id), pointer<const int64_t>(step), step_value, stream};
  const NormalArguments n{batch, size, pointer<float>(out), key, threads};
  py::gil_scoped_release release;
  kernels.fill_philox(n);
}

// What both passes of the policy loss take.
//   latents: velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, noise
//   key: seed, sample_id, step, step_value, stream
PolicyArguments policy_arguments(int64_t rows, int64_t batch, int64_t size, const py::tuple& latents, float guidance_scale, uintptr_t row,
                                 uintptr_t edges, int64_t edge_stride, const py::tuple& key, uintptr_t slopes, int threads) {
  PolicyArguments p{};
  p.rows = rows;
  p.batch = batch;
  p.size = size;
  Latent* const fields[] = {&p.velocity, &p.x_t, &p.x_next, &p.old_velocity, &p.velocity_uncond, &p.velocity_ref, &p.noise};
  for (int j = 0; j < 7; ++j) *fields[j] = latent(latents[j]);
  p.guidance_scale = guidance_scale;
  p.row = checked_row(row, batch, rows);
  p.edges = pointer<const float>(edges);
  p.edge_stride = edge_stride;
  p.key = noise_key(key);
  p.slopes = pointer<float>(slopes);
  p.threads = threads;
  return p;
}

// per_sample: advantage, old_log_prob, step_weight, kl_coef; outputs: loss, log_ratio, ratio, kl, clipped_low, clipped_high
void policy_forward(int64_t rows, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t row, uintptr_t edges,
                    int64_t edge_stride, py::tuple key, uintptr_t slopes, int threads, py::tuple per_sample, float kl_value, double clip_low,
                    double clip_high, bool guard, int reduction, py::tuple outputs) {
  PolicyArguments p = policy_arguments(rows, batch, size, latents, guidance_scale, row, edges, edge_stride, key, slopes, threads);
  const float** const inputs[] = {&p.advantage, &p.old_log_prob, &p.step_weight, &p.kl_coef};
  for (int j = 0; j < 4; ++j) *inputs[j] = pointer<const float>(per_sample[j].cast<uintptr_t>());
  float** const results[] = {&p.loss, &p.log_ratio, &p.ratio, &p.kl};
  for (int j = 0; j < 4; ++j) *results[j] = pointer<float>(outputs[j].cast<uintptr_t>());
  p.clipped_low = pointer<bool>(outputs[4].cast<uintptr_t>());
  p.clipped_high = pointer<bool>(outputs[5].cast<uintptr_t>());
  p.kl_value = kl_value;
  p.reduction = Reduction(reduction);
  const Ratio sums = guard ? Ratio::guard : Ratio::sde;
  const Ratio ratio = p.old_log_prob ? Ratio::recorded : p.old_velocity.data ? sums : Ratio::on_policy;
  const double share = p.reduction == Reduction::mean && batch > 0 ? 1.0 / double(batch) : 1.0;
  p.settings = policy_settings(ratio, guard, clip_low, clip_high, share, guidance_scale, size);
  py::gil_scoped_release release;
  kernels.policy_forward(p);
}

void policy_backward(int64_t rows, int64_t batch, int64_t size, py::tuple latents, float guidance_scale, uintptr_t row, uintptr_t edges,
                     int64_t edge_stride, py::tuple key, uintptr_t slopes, int threads, uintptr_t grad, int64_t grad_stride, bool guard,
                     py::object grad_velocity) {
  PolicyArguments p = policy_arguments(rows, batch, size, latents, guidance_scale, row, edges, edge_stride, key, slopes, threads);
  p.grad = pointer<const float>(grad);
  p.grad_stride = grad_stride;
  p.settings.guard = guard;
  p.grad_velocity = latent(grad_velocity);
  py::gil_scoped_release release;
  kernels.policy_backward(p);
}

// What both passes of the matching loss take.
//   latents: velocity, x0, old_velocity, velocity_ref, velocity_ema, noise
//   key: seed, sample_id, step, step_value, stream
MatchingArguments matching_arguments(int64_t rows, int64_t batch, int64_t size, const py::tuple& latents, uintptr_t row,
                                     const py::tuple& key, uintptr_t slopes, int threads) {
  MatchingArguments m{};
  m.rows = rows;
  m.batch = batch;
  m.rule.size = size;
  Latent* const fields[] = {&m.velocity, &m.x0, &m.old_velocity, &m.ref, &m.ema, &m.noise};
  for (int j = 0; j < 6; ++j) *fields[j] = latent(latents[j]);
  m.row = checked_row(row, batch, rows);
  m.key = noise_key(key);
  m.slopes = pointer<float>(slopes);
  m.threads = threads;
  return m;
}

// outputs: loss, log_ratio, ratio, matching, ref, ema, clipped_low, clipped_high
void matching_forward(int64_t rows, int64_t batch, int64_t size, py::tuple latents, uintptr_t row, py::tuple key, uintptr_t slopes,
                      int threads, uintptr_t sigma, uintptr_t advantage, bool nft, int weighting, double ref_coef, double ema_coef,
                      double clip_low, double clip_high, bool is_mean, bool is_reduced, py::tuple outputs) {
  MatchingArguments m = matching_arguments(rows, batch, size, latents, row, key, slopes, threads);
  m.sigma = pointer<const float>(sigma);
  m.advantage = pointer<const float>(advantage);
  const double share = is_mean && batch > 0 ? 1.0 / double(batch) : 1.0;
  m.rule = {size, nft, m.old_velocity.data != nullptr, weighting, ref_coef, ema_coef, clip_low, clip_high, share};
  m.is_reduced = is_reduced;
  float** const results[] = {&m.loss, &m.log_ratio, &m.ratio, &m.matching, &m.ref_mean, &m.ema_mean};
  for (int j = 0; j < 6; ++j) *results[j] = pointer<float>(outputs[j].cast<uintptr_t>());
  m.clipped_low = pointer<bool>(outputs[6].cast<uintptr_t>());
  m.clipped_high = pointer<bool>(outputs[7].cast<uintptr_t>());
  py::gil_scoped_release release;
  kernels.matching_forward(m);
}

void matching_backward(int64_t rows, int64_t batch, int64_t size, py::tuple latents, uintptr_t row, py::tuple key, uintptr_t slopes,
                       int threads, uintptr_t grad, int64_t grad_stride, py::object grad_velocity) {
  MatchingArguments m = matching_arguments(rows, batch, size, latents, row, key, slopes, threads);
  m.grad = pointer<const float>(grad);
  m.grad_stride = grad_stride;
  m.grad_velocity = latent(grad_velocity);
  py::gil_scoped_release release;
  kernels.matching_backward(m);
}

void add_noise(int64_t batch, int64_t size, py::object x0, py::object noise, py::object out, py::tuple key, uintptr_t sigma, int threads) {
  const NoisingArguments n{batch, size, latent(x0), latent(noise), latent(out), noise_key(key), pointer<const float>(sigma), threads};
  py::gil_scoped_release release;
  kernels.add_noise(n);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "flowkern's CPU kernels; call them through flowkern.ops.";
  m.def("isa", [] { return std::string(kernels.isa); }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, "Use a narrower instruction set; tests compare them.");
  m.def("sde_draw", &sde_draw);
  m.def("sde_replay", &sde_replay);
  m.def("sde_replay_backward", &sde_replay_backward);
  m.def("fill_philox", &fill_philox);
  m.def("policy_forward", &policy_forward);
  m.def("policy_backward", &policy_backward);
  m.def("matching_forward", &matching_forward);
  m.def("matching_backward", &matching_backward);
  m.def("add_noise", &add_noise);
}
