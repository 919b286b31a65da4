// The functions of a module of kernels, one for each verb and each gradient: of tensors, without a torch to build against, so one
// build serves every torch.
//
// A function takes what its verb in flowkern.ops takes, allocates what comes out, and runs; or it returns None, having done
// nothing, where an argument is not as its kernel reads it (see Reader). What is wrong with it is for Python to say.
//
// A module includes this once, after it has named its kernels:
//   kernels                        the functions that launch, as fields
//   run(kernel, arguments, read)   a launch, with what it needs besides its arguments
#pragma once

#include "common/arguments.h"
#include "matching_loss/matching_loss_arguments.h"
#include "policy_loss/policy_loss_arguments.h"
#include "sde_step/sde_step_arguments.h"

namespace {

// The streams of noise, as flowkern.ops._common.arguments numbers them.
enum Stream : uint32_t { kStep = 1, kMatch = 2 };

bool is_given(PyObject* x) { return x != Py_None; }

// ---- the step ----

// x_t, velocity, x_next, rows, velocity_uncond, guidance_scale: what draw, replay and gradient share. x_next is read elsewhere
// where it is written.
void read_step(Reader& read, StepArguments& s, PyObject* x_t, PyObject* velocity, PyObject* rows, PyObject* velocity_uncond,
               PyObject* guidance_scale, int& num_history) {
  s.x_t = read.first_latent(x_t, s.batch, "x_t");
  s.velocity = read.latent(velocity, s.batch, "velocity");
  s.velocity_uncond = read.optional_latent(velocity_uncond, s.batch, "velocity_uncond");
  s.guidance_scale = float(read.guidance(guidance_scale, velocity_uncond));
  s.rows = read.coefficients(rows, s.batch, s.row_stride, num_history);
  s.size = read.size;
  read.require(s.batch * s.size > 0, "x_t");
}

// x_t, velocity, rows, velocity_uncond, guidance_scale, history, noise, seed, sample_id, step,
// x_next: a tensor to write, or None, and its dtype then, or None; log_prob, x0: a tensor to write, or whether it is wanted.
// Returns (x_next, log_prob, x0).
py::object sde_draw(PyObject* const* v, Reader& read) {
  StepArguments s{};
  int needed = 0;
  read_step(read, s, v[0], v[1], v[2], v[3], v[4], needed);
  const bool is_list = PyTuple_CheckExact(v[5]) || PyList_CheckExact(v[5]);
  const Py_ssize_t count = is_list ? PySequence_Fast_GET_SIZE(v[5]) : -1;
  read.require(needed <= count && count <= 3, "history");
  for (Py_ssize_t j = 0; read.serves && j < count; ++j)
    s.history[s.num_history++] = read.latent(PySequence_Fast_GET_ITEM(v[5], j), s.batch, "history");
  s.key = read.noise(v[6], v[7], v[8], v[9], s.batch, kStep, s.noise);
  PyObject *x_next = v[10], *dtype = v[11], *log_prob = v[12], *x0 = v[13];
  read.require(log_prob != Py_True || is_given(v[6]) || is_given(v[8]), "noise");
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
  Made made[3] = {{py::reinterpret_borrow<py::object>(x_next), nullptr}, {py::reinterpret_borrow<py::object>(log_prob), nullptr},
                  {py::reinterpret_borrow<py::object>(x0), nullptr}};
  if (!s.x_next.data) made[0] = make(read, like.shape, like.ndim, stored), s.x_next = {made[0].data, s.size, DType(stored)};
  if (log_prob == Py_True) made[1] = make(read, &s.batch, 1, Element::float32), s.log_prob = reinterpret_cast<float*>(made[1].data);
  if (x0 == Py_True) made[2] = make(read, like.shape, like.ndim, stored), s.x0 = {made[2].data, s.size, DType(stored)};
  run(kernels.draw, s, read);
  return py::make_tuple(made[0].tensor, made[1].tensor, made[2].tensor);
}

// x_t, velocity, x_next, rows, velocity_uncond, guidance_scale -> log_prob
py::object sde_replay(PyObject* const* v, Reader& read) {
  StepArguments s{};
  int needed = 0;
  read_step(read, s, v[0], v[1], v[3], v[4], v[5], needed);
  s.x_next = read.latent(v[2], s.batch, "x_next");
  read.require(needed == 0, "rows");
  if (!read.serves) return py::none();
  const Made log_prob = make(read, &s.batch, 1, Element::float32);
  s.log_prob = reinterpret_cast<float*>(log_prob.data);
  run(kernels.replay, s, read);
  return log_prob.tensor;
}

// grad, x_t, velocity, x_next, rows, velocity_uncond, guidance_scale -> the gradient of velocity
py::object sde_replay_backward(PyObject* const* v, Reader& read) {
  StepArguments s{};
  int needed = 0;
  read_step(read, s, v[1], v[2], v[4], v[5], v[6], needed);
  s.x_next = read.latent(v[3], s.batch, "x_next");
  s.grad_out = read.gradient(v[0], s.batch, s.grad_stride);
  if (!read.serves) return py::none();
  const Made grad = make(read, read.first().shape, read.first().ndim, Element(s.velocity.dtype));
  s.grad = {grad.data, s.size, s.velocity.dtype};
  run(kernels.replay_backward, s, read);
  return grad.tensor;
}

// ---- noise ----

// out, seed, sample_id, step, stream -> out
py::object fill_philox(PyObject* const* v, Reader& read) {
  NormalArguments n{};
  const Latent out = read.first_latent(v[0], n.batch, "out");
  const int64_t stream = read.integer(v[4], 0, 15, "stream");
  n.key = read.key(v[1], v[2], v[3], n.batch, uint32_t(stream));
  read.require(read.serves && read.first().is_packed(0) && out.dtype == DType::float32, "out");
  if (!read.serves) return py::none();
  n.size = read.size;
  n.out = reinterpret_cast<float*>(out.data);
  run(kernels.fill_philox, n, read);
  return py::reinterpret_borrow<py::object>(v[0]);
}

// x0, sigma (batch,), noise, seed, sample_id, step -> x_t
py::object add_noise(PyObject* const* v, Reader& read) {
  NoisingArguments n{};
  n.x0 = read.first_latent(v[0], n.batch, "x0");
  n.size = read.size;
  n.sigma = read.vector<const float>(v[1], n.batch, "sigma");
  read.check_fraction(n.sigma, n.batch, "sigma");
  n.key = read.noise(v[2], v[3], v[4], v[5], n.batch, kMatch, n.noise);
  read.require(is_given(v[2]) || is_given(v[4]), "noise");
  if (!read.serves) return py::none();
  const Made out = make(read, read.first().shape, read.first().ndim, Element(n.x0.dtype));
  n.out = {out.data, n.size, n.x0.dtype};
  run(kernels.add_noise, n, read);
  return out.tensor;
}

// ---- the losses ----

// What comes out of a loss for each sample: numbers, then the two bools; the loss is before them, slopes (batch, n) after. On a
// device they are cut from one allocation. Last, on a CPU, the residual of the velocity's shape, or None.
template <int numbers, int slopes_of_one>
struct LossResult {
  Made loss, values[numbers], clipped_low, clipped_high, slopes, residual{py::none(), nullptr};

  LossResult(Reader& read, int64_t batch, PyObject* reduction, bool is_reduced) {
    const int64_t shape[] = {batch, slopes_of_one};
    if (torch.reads_values) {
      loss = make(read, &batch, is_reduced ? 0 : 1, Element::float32);
      for (Made& value : values) value = make(read, &batch, 1, Element::float32);
      clipped_low = make(read, &batch, 1, Element::boolean);
      clipped_high = make(read, &batch, 1, Element::boolean);
      slopes = make(read, shape, 2, Element::float32);
      return;
    }
    const auto all = checked(PyObject_CallFunction(torch.loss_outputs, "LiiOO", static_cast<long long>(batch), numbers, slopes_of_one,
                                                   reduction, read.device()));
    int next = 0;
    for_each([&](Made& made) { made = made_of(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(all.ptr(), next++))); });
  }
  // What backward will multiply.
  Latent keep(Reader& read) {
    residual = make(read, read.first().shape, read.first().ndim, Element::float32);
    return {residual.data, read.size, DType::float32};
  }
  py::object tuple() {
    py::tuple all(numbers + 5);
    int next = 0;
    for_each([&](Made& made) { all[next++] = made.tensor; });
    all[next] = residual.tensor;
    return all;
  }

 private:
  template <class Body>
  void for_each(Body body) {
    body(loss);
    for (Made& value : values) body(value);
    for (Made* made : {&clipped_low, &clipped_high, &slopes}) body(*made);
  }
};

// Whether a loss keeps its residual for the backward pass; records: whether gradients are recorded.
bool keeps_residual(PyObject* records, PyObject* velocity, const int64_t* row, DType dtype) {
  return torch.reads_values && records == Py_True && Reader::requires_grad(velocity) && !row && dtype == DType::float32;
}

float* floats(const Made& made) { return reinterpret_cast<float*>(made.data); }

const std::initializer_list<const char*> kReductions = {"mean", "sum", "none"};  // of enum Reduction

// What both passes of the policy loss take. x_next, or else the noise that it is drawn again with: noise, seed, sample_id, step.
void read_policy(Reader& read, PolicyArguments& p, PyObject* velocity, PyObject* x_t, PyObject* x_next, PyObject* rows, PyObject* row,
                 PyObject* old_velocity, PyObject* const* noise, PyObject* velocity_uncond, PyObject* guidance_scale,
                 PyObject* velocity_ref) {
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
  p.edges = read.coefficients(rows, p.batch, p.edge_stride, num_history);
  read.require(num_history == 0, "rows");
  p.key = read.noise(noise[0], noise[1], noise[2], noise[3], p.batch, kStep, p.noise);
  const bool is_drawn = is_given(noise[0]) || is_given(noise[2]);
  read.require(is_given(x_next) ? !is_drawn : is_drawn && is_given(old_velocity) && p.x_t.dtype == DType::float32, "x_next");
}

// As flowkern.policy_loss, but for backend: velocity, x_t, x_next, c_rows, advantage, row, old_velocity, old_log_prob, noise, seed,
// sample_id, step, velocity_uncond, guidance_scale, velocity_ref, kl_coef, step_weight, clip_low, clip_high, ratio, reduction; then
// whether gradients are recorded. Returns the fields of PolicyLoss, slopes (batch, 2), and the residual where it is worth keeping.
py::object policy_forward(PyObject* const* v, Reader& read) {
  PolicyArguments p{};
  read_policy(read, p, v[0], v[1], v[2], v[3], v[5], v[6], v + 8, v[12], v[13], v[14]);
  p.advantage = read.vector<const float>(v[4], p.batch, "advantage");
  p.old_log_prob = read.optional_vector<const float>(v[7], p.batch, "old_log_prob");
  if (PyFloat_CheckExact(v[15]) || PyLong_CheckExact(v[15])) {
    p.kl_value = float(read.coefficient(v[15], v[14], "kl_coef"));
  } else {
    p.kl_coef = read.vector<const float>(v[15], p.batch, "kl_coef");
    read.require(is_given(v[14]), "velocity_ref");
  }
  p.step_weight = read.optional_vector<const float>(v[16], p.batch, "step_weight");
  const double clip_low = read.number(v[17], 0, 1, "clip_low"), clip_high = read.number(v[18], 0, HUGE_VAL, "clip_high");
  read.require(clip_low < 1, "clip_low");
  const bool guard = read.choice(v[19], {"sde", "guard"}, "ratio");
  p.reduction = Reduction(read.choice(v[20], kReductions, "reduction"));
  read.require(!is_given(v[7]) || !(is_given(v[6]) || guard), "old_log_prob");
  if (!read.serves) return py::none();

  const Ratio sums = guard ? Ratio::guard : Ratio::sde;
  const Ratio ratio = is_given(v[7]) ? Ratio::recorded : p.old_velocity.data ? sums : Ratio::on_policy;
  if (ratio == Ratio::on_policy) p.x_t = p.x_next = {};  // the log-ratio needs no data
  const double share = p.reduction == Reduction::mean && p.batch > 0 ? 1.0 / double(p.batch) : 1.0;
  p.settings = policy_settings(ratio, guard, clip_low, clip_high, share, p.guidance_scale, p.size);
  LossResult<3, 2> result(read, p.batch, v[20], p.reduction != Reduction::none);
  if (ratio != Ratio::on_policy && keeps_residual(v[21], v[0], p.row, p.velocity.dtype)) p.residual = result.keep(read);
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

// grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, noise, seed, sample_id, step, velocity_uncond, guidance_scale,
// velocity_ref, guard, the residual that forward kept, or None -> the gradient of velocity, in that residual's memory
py::object policy_backward(PyObject* const* v, Reader& read) {
  PolicyArguments p{};
  read_policy(read, p, v[2], v[3], v[4], v[5], v[6], v[7], v + 8, v[12], v[13], v[14]);
  p.grad = read.gradient(v[0], p.batch, p.grad_stride);
  p.slopes = read.vector<float>(v[1], p.batch, "slopes", 2);
  p.settings.guard = v[15] == Py_True;
  p.residual = read.kept(v[16], p.rows, p.row);
  if (!read.serves) return py::none();
  if (p.residual.data) {
    run(kernels.policy_backward, p, read);
    return py::reinterpret_borrow<py::object>(v[16]);
  }
  const Made grad = make(read, read.first().shape, read.first().ndim, Element(p.velocity.dtype));
  p.grad_velocity = {grad.data, p.size, p.velocity.dtype};
  run(kernels.policy_backward, p, read);
  return grad.tensor;
}

// What both passes of the matching losses take; noise: noise, seed, sample_id, step.
void read_matching(Reader& read, MatchingArguments& m, PyObject* velocity, PyObject* x0, PyObject* row, PyObject* const* noise,
                   PyObject* old_velocity, PyObject* velocity_ref, PyObject* velocity_ema) {
  m.velocity = read.first_latent(velocity, m.rows, "velocity");
  read.row(row, m);
  m.rule.size = read.size;
  m.x0 = read.latent(x0, m.batch, "x0");
  m.old_velocity = read.optional_latent(old_velocity, m.rows, "old_velocity");
  m.ref = read.optional_latent(velocity_ref, m.rows, "velocity_ref");
  m.ema = read.optional_latent(velocity_ema, m.rows, "velocity_ema");
  m.key = read.noise(noise[0], noise[1], noise[2], noise[3], m.batch, kMatch, m.noise);
  read.require(is_given(noise[0]) || is_given(noise[2]), "noise");
}

// As flowkern.matching_loss, but for backend, and for step: None where noise is given. velocity, x0, sigma, advantage, row, noise,
// seed, sample_id, step, objective, weighting, old_velocity, velocity_ref, velocity_ema, ref_coef, ema_coef, clip_low, clip_high,
// reduction; then whether gradients are recorded. Returns the fields of MatchingLoss, slopes (batch, 4), and the residual where it is
// worth keeping.
py::object matching_forward(PyObject* const* v, Reader& read) {
  MatchingArguments m{};
  read_matching(read, m, v[0], v[1], v[4], v + 5, v[11], v[12], v[13]);
  if (PyFloat_CheckExact(v[2])) {
    m.sigma_value = float(read.number(v[2], 0, 1, "sigma"));
  } else {
    m.sigma = read.vector<const float>(v[2], m.batch, "sigma");
    read.check_fraction(m.sigma, m.batch, "sigma");
  }
  m.advantage = read.vector<const float>(v[3], m.batch, "advantage");
  const bool nft = read.choice(v[9], {"awm", "nft"}, "objective");
  const int weighting = read.choice(v[10], {"uniform", "t", "ghuber"}, "weighting");
  const double ref_coef = read.coefficient(v[14], v[12], "ref_coef"), ema_coef = read.coefficient(v[15], v[13], "ema_coef");
  const double clip_low = read.number(v[16], 0, 1, "clip_low"), clip_high = read.number(v[17], 0, HUGE_VAL, "clip_high");
  const Reduction reduction = Reduction(read.choice(v[18], kReductions, "reduction"));
  if (!read.serves) return py::none();

  const double share = reduction == Reduction::mean && m.batch > 0 ? 1.0 / double(m.batch) : 1.0;
  m.rule = {read.size, nft, m.old_velocity.data != nullptr, weighting, ref_coef, ema_coef, clip_low, clip_high, share};
  m.is_reduced = reduction != Reduction::none;
  LossResult<5, 4> result(read, m.batch, v[18], m.is_reduced);
  const bool is_one_residual = !(nft && m.old_velocity.data);
  if (is_one_residual && keeps_residual(v[19], v[0], m.row, m.velocity.dtype)) m.residual = result.keep(read);
  m.loss = floats(result.loss);
  float** const values[] = {&m.log_ratio, &m.ratio, &m.matching, &m.ref_mean, &m.ema_mean};
  for (int j = 0; j < 5; ++j) *values[j] = floats(result.values[j]);
  m.clipped_low = reinterpret_cast<bool*>(result.clipped_low.data);
  m.clipped_high = reinterpret_cast<bool*>(result.clipped_high.data);
  m.slopes = floats(result.slopes);
  run(kernels.matching_forward, m, read);
  return result.tuple();
}

// grad, slopes, velocity, x0, row, noise, seed, sample_id, step, old_velocity, velocity_ref, velocity_ema, the residual that forward
// kept, or None -> the gradient of velocity, in that residual's memory
py::object matching_backward(PyObject* const* v, Reader& read) {
  MatchingArguments m{};
  read_matching(read, m, v[2], v[3], v[4], v + 5, v[9], v[10], v[11]);
  m.grad = read.gradient(v[0], m.batch, m.grad_stride);
  m.slopes = read.vector<float>(v[1], m.batch, "slopes", 4);
  m.residual = read.kept(v[12], m.rows, m.row);
  if (!read.serves) return py::none();
  if (m.residual.data) {
    run(kernels.matching_backward, m, read);
    return py::reinterpret_borrow<py::object>(v[12]);
  }
  const Made grad = make(read, read.first().shape, read.first().ndim, Element(m.velocity.dtype));
  m.grad_velocity = {grad.data, read.size, m.velocity.dtype};
  run(kernels.matching_backward, m, read);
  return grad.tensor;
}

// What the kernels need of torch, by name: see flowkern.ops._common.native.connect. `exchange` is the capsule of
// torch.Tensor.__dlpack_c_exchange_api__, or None.
void connect(const py::dict& names) {
  const auto keep = [&](const char* name) { return py::object(names[name]).release().ptr(); };  // for the life of the process
  torch.tensor = keep("tensor");
  torch.parameter = keep("parameter");
  torch.coefficients = keep("coefficients");
  torch.empty = keep("empty");
  torch.is_neg = keep("is_neg");
  torch.get_num_threads = keep("get_num_threads");
  torch.stream = keep("stream");
  torch.scratch = keep("scratch");
  torch.siblings = keep("siblings");
  torch.loss_outputs = keep("loss_outputs");
  torch.num_history = PyUnicode_InternFromString("num_history");  // Python remembers where attributes are by the name's address
  torch.table = PyUnicode_InternFromString("table");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.device = PyUnicode_InternFromString("device");
  torch.served = names["served"].cast<int32_t>();
  torch.reads_values = kReadsValues;
  const auto dtypes = names["dtypes"].cast<py::tuple>();
  for (int j = 0; j < 6; ++j) torch.dtypes[j] = py::object(dtypes[j]).release().ptr();
  torch.exchange = nullptr;
  const py::object exchange = names["exchange"];
  if (exchange.is_none()) return;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->major != 1) api = api->previous;
  if (api && api->view) torch.exchange = api;
}

#define FK_FUNCTION(name, count) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&function<name, count>)), METH_FASTCALL, nullptr}

PyMethodDef kFunctions[] = {
    FK_FUNCTION(sde_draw, 14),         FK_FUNCTION(sde_replay, 6),      FK_FUNCTION(sde_replay_backward, 7),
    FK_FUNCTION(fill_philox, 5),       FK_FUNCTION(add_noise, 6),       FK_FUNCTION(policy_forward, 22),
    FK_FUNCTION(policy_backward, 17),  FK_FUNCTION(matching_forward, 20), FK_FUNCTION(matching_backward, 13),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
