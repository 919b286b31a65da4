// Rescaled guidance as functions of Python's (verbs.h).
#pragma once

#include "../common/function.h"
#include "guidance.h"

namespace {

constexpr size_t kGuidanceInputs = 5;

// velocity, velocity_uncond (batch, channels, *rows, width), guidance_scale, and the size of a token.
void read_guidance(Reader& read, GuidanceArguments& s, Given<kGuidanceInputs> inputs) {
  const auto& [velocity, velocity_uncond, guidance_scale, patch_rows, patch_width] = inputs;
  s.velocity = read.first_latent(velocity, s.batch, "velocity");
  s.velocity_uncond = read.latent(velocity_uncond, s.batch, "velocity_uncond");
  s.guidance_scale = float(read.guidance(guidance_scale, velocity_uncond));
  s.patch_rows = read.integer(patch_rows, 1, read.size, "patch");
  s.patch_width = read.integer(patch_width, 1, read.size, "patch");
  read.require(s.batch * read.size > 0, "velocity");
  if (!read.serves) return;
  const View& like = read.first();
  const int64_t height = like.ndim > 3 ? like.shape[like.ndim - 2] : 1;
  s.channels = like.shape[1];
  s.width = like.ndim > 2 ? like.shape[like.ndim - 1] : 1;
  s.rows = read.size / (s.channels * s.width);
  read.require(height % s.patch_rows == 0 && s.width % s.patch_width == 0, "patch");
}

namespace functions {

py::object rescaled_guidance(Given<kGuidanceInputs> given, Reader& read) {
  GuidanceArguments s{};
  read_guidance(read, s, given);
  if (!read.serves) return py::none();
  const Made out = make_like_first(read, DType::float32, s.out);
  run(kernels.rescaled_guidance, s, read);
  return out.tensor;
}

// The inputs, the gradient of the result, and whether that of velocity_uncond is wanted. Returns those of both velocities.
py::object rescaled_guidance_backward(Given<kGuidanceInputs + 2> given, Reader& read) {
  GuidanceArguments s{};
  read_guidance(read, s, part<0, kGuidanceInputs>(given));
  const auto& [grad_out, wants_uncond] = part<kGuidanceInputs, 2>(given);
  s.grad_out = read.latent(grad_out, s.batch, "grad");
  read.require(s.grad_out.dtype == DType::float32, "grad");
  if (!read.serves) return py::none();
  const Made grad = make_like_first(read, s.velocity.dtype, s.grad);
  py::object grad_uncond = py::none();
  if (wants_uncond == Py_True) grad_uncond = make_like_first(read, s.velocity_uncond.dtype, s.grad_uncond).tensor;
  run(kernels.rescaled_guidance_backward, s, read);
  return py::make_tuple(grad.tensor, grad_uncond);
}

}  // namespace functions
}  // namespace
