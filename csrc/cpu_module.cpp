// flowkern._cpu: the CPU kernels as functions of tensors (verbs.h), by the widest instruction set that the processor has.
#include <pthread.h>

#include "common/arguments.h"
#include "matching_loss/matching_loss_cpu.h"
#include "policy_loss/policy_loss_cpu.h"
#include "sde_step/sde_step_cpu.h"

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

constexpr bool kReadsValues = true;

// A forked process has none of the threads of OpenMP, which would wait for them for ever.
bool is_forked = false;

// Without the interpreter's lock, on as many threads as torch uses.
template <class T>
void run(void (*kernel)(const T&), T& arguments, const Reader&) {
  arguments.threads = is_forked ? 1 : int(PyLong_AsLong(checked(PyObject_CallNoArgs(torch.get_num_threads)).ptr()));
  const Unlocked unlocked;
  kernel(arguments);
}

}  // namespace

#include "verbs.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "flowkern's CPU kernels; call them through flowkern.ops.";
  pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
  m.def("isa", [] { return std::string(kernels.isa); }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, "Use a narrower instruction set; tests compare them.");
  m.def("connect", &connect, "What the functions need of torch; called once.");
  if (PyModule_AddFunctions(m.ptr(), kFunctions) != 0) throw py::error_already_set();
}
