// The functions of a module of kernels, one for each verb and each gradient: of tensors, without a torch to build against, so one
// build serves every torch.
//
// A function has the name of its kernel. It takes what its verb in flowkern.ops takes, allocates what comes out, and runs; or it
// returns None, having done nothing, where an argument is not as its kernel reads it (see Reader). What is wrong with it is for
// Python to say.
//
// A module includes this once, after it has named its kernels:
//   kernels                        the functions that launch, as fields
//   run(kernel, arguments, read)   a launch, with what it needs besides its arguments
//   FK_SERVED(X)                   X(kernel, what it takes) for all of them
#pragma once

#include "common/function.h"
#include "matching_loss/matching_loss_python.h"
#include "ops.h"
#include "policy_loss/policy_loss_python.h"
#include "sde_step/sde_step_python.h"

namespace {

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

#define FK_FUNCTION(name, Arguments) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&function<&functions::name>)), METH_FASTCALL, nullptr},

PyMethodDef kFunctions[] = {FK_SERVED(FK_FUNCTION){nullptr, nullptr, 0, nullptr}};

}  // namespace
