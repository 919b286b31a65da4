// The clip of an importance ratio r, on its logarithm: a clip range of 2e-6 is a few steps of a float32 near 1.
//
//     max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
#pragma once

#include <cmath>

#include "platform.h"

// log1p(-clip_low), log1p(clip_high). T is the precision that log-ratios are compared in.
template <class T>
struct ClipRange {
  T low, high;
};

template <class T>
FK_INLINE ClipRange<T> clip_range(double clip_low, double clip_high) {
  return {T(log1p(-clip_low)), T(log1p(clip_high))};
}

// d value / d log_ratio is value itself where nothing is clipped; a tie keeps it.
struct Clipped {
  bool is_low, is_high;
  double value;
};

template <class T>
FK_INLINE Clipped clipped(const ClipRange<T>& range, T advantage, T log_ratio) {
  const bool is_high = advantage > 0 && log_ratio > range.high, is_low = advantage < 0 && log_ratio < range.low;
  const double clamped = is_high ? range.high : is_low ? range.low : log_ratio;
  return {is_low, is_high, -double(advantage) * (1.0 + expm1(clamped))};
}
