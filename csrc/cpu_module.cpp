// flowkern._cpu: the CPU kernels behind raw pointers, so one build serves every torch. Shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>

#include <string>

#include "sde_step/sde_step_cpu.h"

namespace py = pybind11;

namespace {

struct Kernels {
  const char* isa;
  void (*draw)(const StepArguments&);
  void (*replay)(const StepArguments&);
  void (*replay_backward)(const StepArguments&);
  void (*fill_philox)(const NormalArguments&);
};

#define FK_KERNELS(isa) {#isa, isa::sde_draw, isa::sde_replay, isa::sde_replay_backward, isa::fill_philox}

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "flowkern's CPU kernels; call them through flowkern.ops.";
  m.def("isa", [] { return std::string(kernels.isa); }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, "Use a narrower instruction set; tests compare them.");
  m.def("sde_draw", &sde_draw);
  m.def("sde_replay", &sde_replay);
  m.def("sde_replay_backward", &sde_replay_backward);
  m.def("fill_philox", &fill_philox);
}
