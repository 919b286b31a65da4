// Latents of three dtypes in groups of eight elements, loaded as they lie in memory and computed on as float32.
//
// A dtype is a branch that all threads take alike: one kernel serves every mix of dtypes. Calls in float32 alone and in bfloat16 alone
// have kernels of their own, where the compiler knows the dtype: fewer registers, so more threads, and fewer instructions.
#pragma once

#include "philox.h"
#include "platform_cuda.cuh"

template <Calls kCalls, class... Latents>
FK_DEVICE void know_dtypes(Latents&... latents) {
  if constexpr (kCalls == Calls::plain_float32) ((latents.dtype = DType::float32), ...);
  if constexpr (kCalls == Calls::plain_bfloat16) ((latents.dtype = DType::bfloat16), ...);
}

inline Calls calls_of(std::initializer_list<const Latent*> latents) {
  bool all[2] = {true, true};
  for (const Latent* latent : latents) {
    all[0] = all[0] && (!latent->data || latent->dtype == DType::float32);
    all[1] = all[1] && (!latent->data || latent->dtype == DType::bfloat16);
  }
  return all[0] ? Calls::plain_float32 : all[1] ? Calls::plain_bfloat16 : Calls::any;
}

// Eight elements as they lie in memory; those of 16 bits fill the first half.
struct Group {
  uint32_t word[kGroup];
};

// Where a thread's group lies.
struct Place {
  int64_t sample, first;
  int count;  // elements to read and write, at most kGroup
};

FK_DEVICE Place place_of_thread(int64_t sample, int64_t tile, int64_t size) {
  const int64_t first = (tile * blockDim.x + threadIdx.x) * kGroup, left = size - first;
  return {sample, first, int(left < kGroup ? (left > 0 ? left : 0) : kGroup)};
}

FK_DEVICE char* address_of(const Latent& latent, const Place& at) {
  const int shift = latent.dtype == DType::float32 ? 2 : 1;
  return latent.data + (at.sample * latent.stride << shift) + (at.first << shift);
}

// kWhole: the group is complete and 16-byte aligned in every latent of the launch. Else element by element.
template <bool kWhole>
FK_DEVICE Group load(const Latent& latent, const Place& at) {
  const char* data = address_of(latent, at);
  if constexpr (kWhole) {
    const uint4 low = *reinterpret_cast<const uint4*>(FK_ALIGNED(data));
    uint4 high = {};
    if (latent.dtype == DType::float32) high = reinterpret_cast<const uint4*>(data)[1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  } else {
    Group group = {};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i >= at.count) continue;
      if (latent.dtype == DType::float32) group.word[i] = reinterpret_cast<const uint32_t*>(data)[i];
      else group.word[i / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(data)[i]) << (i % 2 * 16);
    }
    return group;
  }
}

template <bool kWhole>
FK_DEVICE void store(const Latent& latent, const Place& at, const Group& group) {
  char* data = address_of(latent, at);
  const uint32_t* w = group.word;
  if constexpr (kWhole) {
    *reinterpret_cast<uint4*>(FK_ALIGNED(data)) = uint4{w[0], w[1], w[2], w[3]};
    if (latent.dtype == DType::float32) reinterpret_cast<uint4*>(data)[1] = uint4{w[4], w[5], w[6], w[7]};
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i >= at.count) continue;
      if (latent.dtype == DType::float32) reinterpret_cast<uint32_t*>(data)[i] = w[i];
      else reinterpret_cast<uint16_t*>(data)[i] = uint16_t(w[i / 2] >> (i % 2 * 16));
    }
  }
}

// Eight elements as float32.
struct Floats {
  float v[kGroup];
};

FK_DEVICE Floats widen(const Group& group, DType dtype) {
  Floats out;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out.v[i] = __uint_as_float(group.word[i]);
  if (dtype == DType::bfloat16) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out.v[i] = __uint_as_float(i % 2 ? group.word[i / 2] & 0xFFFF0000u : group.word[i / 2] << 16);
  } else if (dtype == DType::float16) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out.v[i] = __half2float(__ushort_as_half(uint16_t(group.word[i / 2] >> (i % 2 * 16))));
  }
  return out;
}

// Rounded to nearest even, as torch rounds.
FK_DEVICE Group narrow(const Floats& value, DType dtype) {
  Group group = {};
  if (dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.word[i] = __float_as_uint(value.v[i]);
  } else if (dtype == DType::bfloat16) {
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(value.v[i], value.v[i + 1]);
      group.word[i / 2] = uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      const __half2 pair = __floats2half2_rn(value.v[i], value.v[i + 1]);
      group.word[i / 2] = uint32_t(__half_as_ushort(pair.x)) | uint32_t(__half_as_ushort(pair.y)) << 16;
    }
  }
  return group;
}

// The normals of eight elements: two Philox counters. `first` is a multiple of eight.
FK_DEVICE Floats normals(const NoiseKey& key, int64_t sample, int64_t first) {
  const uint64_t id = uint64_t(key.sample_id[sample]);
  const uint32_t word = counter_word(key, sample);
  Floats out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Philox4 counter = {uint32_t(first / 4) + half, word, uint32_t(id), uint32_t(id >> 32)};
    const Philox4 bits = philox4x32_10(counter, uint32_t(key.seed), uint32_t(key.seed >> 32));
    const Normal2 low = box_muller(bits.x, bits.y), high = box_muller(bits.z, bits.w);
    out.v[4 * half] = low.first;
    out.v[4 * half + 1] = low.second;
    out.v[4 * half + 2] = high.first;
    out.v[4 * half + 3] = high.second;
  }
  return out;
}

template <bool kWhole>
FK_DEVICE Group load_if_given(const Latent& latent, const Place& at) {
  return latent.data ? load<kWhole>(latent, at) : Group{};
}

// The same where the way is known at run time.
FK_DEVICE Group load_group(const Latent& latent, const Place& at, bool is_whole) {
  return is_whole ? load_if_given<true>(latent, at) : load_if_given<false>(latent, at);
}

FK_DEVICE void store_group(const Latent& latent, const Place& at, bool is_whole, const Floats& value) {
  const Group group = narrow(value, latent.dtype);
  if (is_whole) store<true>(latent, at, group);
  else store<false>(latent, at, group);
}

// Whether every group of a latent, but a sample's last, may be read in 128 bits.
inline bool takes_vectors(const Latent& latent, int64_t samples) {
  const int64_t bytes = latent.dtype == DType::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(latent.data) % 16 == 0 && (samples == 1 || latent.stride * bytes % 16 == 0);
}
