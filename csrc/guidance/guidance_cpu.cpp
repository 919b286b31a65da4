// Rescaled guidance on a CPU. Compiled once per instruction set (FK_ISA names the instance).
#include "guidance.h"

#include <vector>

#include "../common/chunks_cpu.h"
#include "../common/gaussian_step.h"

namespace FK_ISA {
namespace {

// A row of tokens, whose elements lie in runs of one row of one channel: 4 or 8 KB apart in latents of usual sizes, so that they share
// a few lines of a cache. What is read twice is copied.
struct TokenRow {
  explicit TokenRow(const GuidanceArguments& s)
      : width(s.width), runs(s.channels * s.patch_rows), sums(3 * width), floats(runs * width * 3 + width * 5) {}
  int64_t width, runs;
  std::vector<double> sums;  // by columns
  std::vector<float> floats;
  float* copy(int which, int64_t run) { return floats.data() + (which * runs + run) * width; }
  float* line(int which) { return floats.data() + 3 * runs * width + which * width; }  // of `width` elements
  double* sum(int which) { return sums.data() + which * width; }

  // The sums of tokens of columns, each in its first column.
  void add_columns(int count, int64_t patch_width) {
    for (int which = 0; which < count; ++which)
      for (int64_t first = 0; first < width; first += patch_width)
        for (int64_t j = 1; j < patch_width; ++j) sum(which)[first] += sum(which)[first + j];
  }
};

// Runs body(row, sample, element_of) over all rows of tokens, in parallel; element_of(run): where in the sample a run begins.
template <class Body>
void for_token_rows(const GuidanceArguments& s, Body body) {
  const int64_t groups = s.rows / s.patch_rows, tasks = s.batch * groups;
  const int team = int(std::min({int64_t(s.threads), tasks, s.batch * s.channels * s.rows * s.width / kPerThread}));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    TokenRow row(s);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      std::fill(row.sums.begin(), row.sums.end(), 0.0);
      const int64_t first = task % groups * s.patch_rows;
      body(row, task / groups, [=, &s](int64_t run) { return (run / s.patch_rows * s.rows + first + run % s.patch_rows) * s.width; });
    }
  }
}

}  // namespace

void rescaled_guidance(const GuidanceArguments& s) {
  for_token_rows(s, [&](TokenRow& row, int64_t sample, auto element_of) {
    const int64_t width = row.width;
    double *const of_velocity = row.sum(0), *const of_guided = row.sum(1);
    for (int64_t run = 0; run < row.runs; ++run) {
      const int64_t at = element_of(run);
      const float* velocity = widen(s.velocity.at(sample, at), s.velocity.dtype, width, row.line(0));
      const float* uncond = widen(s.velocity_uncond.at(sample, at), s.velocity_uncond.dtype, width, row.line(1));
      float* const guided = row.copy(0, run);
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const float g = guided_velocity(velocity[x], uncond[x], s.guidance_scale);
        guided[x] = g;
        of_velocity[x] += double(velocity[x]) * double(velocity[x]);
        of_guided[x] += double(g) * double(g);
      }
    }
    row.add_columns(2, s.patch_width);
    float* const ratio = row.line(0);
    for (int64_t first = 0; first < width; first += s.patch_width)
      std::fill_n(ratio + first, s.patch_width, float(length_ratio(of_velocity[first], of_guided[first])));
    for (int64_t run = 0; run < row.runs; ++run) {
      float* const out = reinterpret_cast<float*>(s.out.at(sample, element_of(run)));
      const float* const guided = row.copy(0, run);
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) out[x] = guided[x] * ratio[x];
    }
  });
}

void rescaled_guidance_backward(const GuidanceArguments& s) {
  for_token_rows(s, [&](TokenRow& row, int64_t sample, auto element_of) {
    const int64_t width = row.width;
    double *const of_velocity = row.sum(0), *const of_guided = row.sum(1), *const with_grad = row.sum(2);
    for (int64_t run = 0; run < row.runs; ++run) {
      const int64_t at = element_of(run);
      const float* read = widen(s.velocity.at(sample, at), s.velocity.dtype, width, row.line(0));
      const float* uncond = widen(s.velocity_uncond.at(sample, at), s.velocity_uncond.dtype, width, row.line(1));
      const float* given = reinterpret_cast<const float*>(s.grad_out.at(sample, at));
      float *const guided = row.copy(0, run), *const velocity = row.copy(1, run), *const grad = row.copy(2, run);
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const float v = read[x], g = guided_velocity(v, uncond[x], s.guidance_scale);
        velocity[x] = v, guided[x] = g, grad[x] = given[x];
        of_velocity[x] += double(v) * double(v);
        of_guided[x] += double(g) * double(g);
        with_grad[x] += double(g) * double(given[x]);
      }
    }
    row.add_columns(3, s.patch_width);
    float *const ratio = row.line(0), *const along = row.line(1);
    for (int64_t first = 0; first < width; first += s.patch_width) {
      std::fill_n(ratio + first, s.patch_width, float(length_ratio(of_velocity[first], of_guided[first])));
      std::fill_n(along + first, s.patch_width, float(with_grad[first] / of_guided[first]));
    }
    const float w = s.guidance_scale;
    float *const of_cond = row.line(2), *const of_uncond = row.line(3);
    for (int64_t run = 0; run < row.runs; ++run) {
      const float *guided = row.copy(0, run), *velocity = row.copy(1, run), *grad = row.copy(2, run);
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const TokenSlopes slopes = token_slopes(ratio[x], along[x], velocity[x], guided[x], grad[x]);
        of_cond[x] = w * slopes.in_guided + slopes.in_length;
        of_uncond[x] = (1.0f - w) * slopes.in_guided;
      }
      narrow(of_cond, s.grad.at(sample, element_of(run)), s.grad.dtype, width);
      if (s.grad_uncond.data) narrow(of_uncond, s.grad_uncond.at(sample, element_of(run)), s.grad_uncond.dtype, width);
    }
  });
}

}  // namespace FK_ISA
