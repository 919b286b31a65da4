// flowkern._cuda: the CUDA kernels as functions of tensors (verbs.h).
//
// It carries its own CUDA runtime, so it imports where there is no driver; a launch there is an exception.
#include "common/function.h"
#include "common/launch_cuda.h"
#include "ops.h"

#define FK_FIELD(name, Arguments) void (*name)(const Arguments&, const Queue&);
#define FK_ADDRESS(name, Arguments) name,
#define FK_DECLARE(name, Arguments)          \
  void name(const Arguments&, const Queue&); \
  ScratchSize scratch_of(const Arguments&);
#define FK_DECLARE_OP(op) std::string op##_why_not(int device);
#define FK_WHY_NOT(op) op##_why_not,

FK_KERNELS(FK_DECLARE)
FK_OPS(FK_DECLARE_OP)

namespace {

constexpr struct {
  FK_KERNELS(FK_FIELD)
} kernels = {FK_KERNELS(FK_ADDRESS)};

constexpr bool kReadsValues = false;

// Memory of flowkern.ops._common.native_cuda.scratch: floats, and integers that are 0.
struct Memory {
  Made floats, counts;

  Memory(const Queue& queue, const ScratchSize& size, bool is_captured) {
    const auto both = checked(PyObject_CallFunction(torch.scratch, "iKLLO", queue.device, static_cast<unsigned long long>(queue.stream),
                                                    static_cast<long long>(size.floats), static_cast<long long>(size.counts),
                                                    is_captured ? Py_True : Py_False));
    floats = made_of(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(both.ptr(), 0)));
    counts = made_of(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(both.ptr(), 1)));
  }
  Scratch scratch() const { return {reinterpret_cast<float*>(floats.data), reinterpret_cast<int*>(counts.data)}; }
};

// One set per stream, on which kernels do not overlap. For the life of the process: it goes with Python's objects.
struct Kept {
  Queue queue;
  ScratchSize size;
  Memory memory;
};
std::vector<Kept>& all_kept() {
  static auto* const kept = new std::vector<Kept>;
  return *kept;
}
void forget() { all_kept().clear(); }

int64_t capacity(int64_t needed, int64_t least) {
  while (least < needed) least *= 2;
  return least;
}

Scratch kept_scratch(const Queue& queue, const ScratchSize& size) {
  std::vector<Kept>& kept = all_kept();
  const auto is_ours = [&](const Kept& k) { return k.queue.device == queue.device && k.queue.stream == queue.stream; };
  auto found = std::find_if(kept.begin(), kept.end(), is_ours);
  if (found != kept.end() && found->size.floats >= size.floats && found->size.counts >= size.counts) return found->memory.scratch();
  ScratchSize enough = {capacity(size.floats, 1 << 18), capacity(size.counts, 1 << 14)};
  if (found != kept.end()) {
    enough = {std::max(enough.floats, found->size.floats), std::max(enough.counts, found->size.counts)};
    kept.erase(found);
  }
  kept.push_back({queue, enough, Memory(queue, enough, false)});
  return kept.back().memory.scratch();
}

// On the current stream of the device of the tensors that were read, without the interpreter's lock.
template <class T>
void run(void (*kernel)(const T&, const Queue&), const T& arguments, const Reader& read) {
  Queue queue;
  queue.device = read.device_index();
  const py::int_ index(queue.device);
  queue.stream = checked(PyObject_CallOneArg(torch.stream, index.ptr())).cast<uintptr_t>();
  const ScratchSize size = scratch_of(arguments);
  std::vector<Memory> captured;  // a graph has its own, and clears it; memory freed after the launch is used behind it
  if (size.counts > 0 && is_capturing(queue)) {
    captured.emplace_back(queue, size, true);
    queue.scratch = captured.back().scratch();
  } else if (size.counts > 0) {
    queue.scratch = kept_scratch(queue, size);
  }
  const Unlocked unlocked;
  kernel(arguments, queue);
}

std::string why_not(int device) {
  for (const auto op : {FK_OPS(FK_WHY_NOT)}) {
    const std::string reason = op(device);
    if (!reason.empty()) return reason;
  }
  return "";
}

}  // namespace

#define FK_SERVED FK_KERNELS
#include "verbs.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "flowkern's CUDA kernels; call them through flowkern.ops.";
  m.def("why_not", &why_not, "Why this build cannot run on a device; empty where it can. Loads the kernels.");
  m.def("tiles_of", &tiles_of, "The tiles that a sample of so many elements is cut into.");
  m.def("forget", &forget, "Lets go of the scratch memory that is kept; tests count it.");
  m.def("connect", &connect, "What the functions need of torch; called once.");
#ifdef FK_SOURCES
  m.attr("sources") = FK_SOURCES;  // what setup.py compiled
#endif
  if (PyModule_AddFunctions(m.ptr(), kFunctions) != 0) throw py::error_already_set();
}
