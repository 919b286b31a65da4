// flowkern._cpu: the CPU kernels as functions of tensors (verbs.h), by the widest instruction set that the processor has.
#include <pthread.h>

#include "common/function.h"
#include "ops.h"

#define FK_FIELD(name, Arguments) void (*name)(const Arguments&);
#define FK_DECLARE(name, Arguments) void name(const Arguments&);
#define FK_ADDRESS(name, Arguments) name,
#define FK_INSTANCE(isa)                                           \
  namespace isa {                                                  \
  FK_CPU_KERNELS(FK_DECLARE)                                       \
  constexpr Kernels kKernels = {#isa, FK_CPU_KERNELS(FK_ADDRESS)}; \
  }

namespace {
struct Kernels {
  const char* isa;
  FK_CPU_KERNELS(FK_FIELD)
};
}  // namespace

FK_INSTANCE(baseline)
#if defined(FK_X86_INSTANCES)
FK_INSTANCE(avx2)
FK_INSTANCE(avx512)
#endif

namespace {

// The widest instance that this processor can run.
Kernels choose_kernels() {
#if defined(FK_X86_INSTANCES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return avx512::kKernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

Kernels kernels = choose_kernels();

void use_isa(const std::string& isa) {
  const Kernels widest = choose_kernels();
  if (isa == "baseline") kernels = baseline::kKernels;
#if defined(FK_X86_INSTANCES)
  else if (isa == "avx2" && std::string(widest.isa) != "baseline") kernels = avx2::kKernels;
  else if (isa == "avx512" && std::string(widest.isa) == "avx512") kernels = avx512::kKernels;
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

#include "guidance/guidance_python.h"
#include "token_loss/token_loss_python.h"
#define FK_SERVED FK_CPU_KERNELS
#include "verbs.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "flowkern's CPU kernels; call them through flowkern.ops.";
  pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
  m.def("isa", [] { return std::string(kernels.isa); }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, "Use a narrower instruction set; tests compare them.");
  m.def("connect", &connect, "What the functions need of torch; called once.");
#ifdef FK_SOURCES
  m.attr("sources") = FK_SOURCES;  // what setup.py compiled
#endif
  if (PyModule_AddFunctions(m.ptr(), kFunctions) != 0) throw py::error_already_set();
}
