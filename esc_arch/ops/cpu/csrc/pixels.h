// Pixels whose channels lie together, and their layer normalisation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "vectors.h"

namespace esc_arch {

ESC_ARCH_INLINE Vec load_count(const float* from, int64_t count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

ESC_ARCH_INLINE void store_count(float* to, Vec value, int64_t count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_first(to, value, count);
  }
}

// The sum of `count` channels of pixels that are `step` floats apart.
ESC_ARCH_INLINE Vec sum_of_pixels(const float* from, int64_t pixels, int64_t step, int64_t count) {
  constexpr int64_t kChains = 4;  // or every addition would wait for the one before
  Vec chains[kChains] = {};
  for (int64_t p = 0; p < pixels; ++p) chains[p % kChains] += load_count(from + p * step, count);
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// A pixel's channels as vectors; beyond the last channel they are zero.
struct Pixel {
  int64_t whole, rest;  // vectors, and channels after them
  Vec mask;             // 1 where the last vector has a channel
  float share;          // 1 / channels

  explicit Pixel(int64_t channels) : whole(channels / kLanes), rest(channels % kLanes), mask{}, share(1.0f / channels) {
    for (int64_t lane = 0; lane < rest; ++lane) mask[lane] = 1;
  }

  template <typename Use>
  ESC_ARCH_INLINE void each(Use use) const {
    for (int64_t v = 0; v < whole; ++v) use(v * kLanes, kLanes);
    if (rest) use(whole * kLanes, rest);
  }
};

struct Moments {
  float mean, scale;
};

ESC_ARCH_INLINE Moments moments(const Pixel& pixel, const float* x, float eps) {
  Vec sum = {}, squares = {};
  pixel.each([&](int64_t c, int64_t count) { sum += load_count(x + c, count); });
  const float mean = sum_of_lanes(sum) * pixel.share;
  pixel.each([&](int64_t c, int64_t count) {
    const Vec centred = load_count(x + c, count) - broadcast(mean);
    squares += centred * centred * (count == kLanes ? broadcast(1) : pixel.mask);
  });
  return {mean, 1 / std::sqrt(sum_of_lanes(squares) * pixel.share + eps)};
}

// use(pixel, channel, count, normalised channels) for all channels of all pixels, which lie one after the other.
template <typename Use>
ESC_ARCH_INLINE void normalise(int64_t pixels, int64_t channels, const float* x, const float* weight, const float* bias,
                               float eps, Use use) {
  const Pixel pixel(channels);
  for (int64_t first = 0; first < pixels; first += kLanes) {
    const int64_t count = std::min(kLanes, pixels - first);
    const float* block = x + first * channels;
    Vec sums[kLanes];
    float means[kLanes], scales[kLanes];
    for (int64_t p = count; p < kLanes; ++p) sums[p] = Vec{};
    for (int64_t p = 0; p < count; ++p) {
      Vec sum = {};
      pixel.each([&](int64_t c, int64_t n) { sum += load_count(block + p * channels + c, n); });
      sums[p] = sum;
    }
    store(means, sums_of_lanes(sums) * broadcast(pixel.share));
    for (int64_t p = 0; p < count; ++p) {
      Vec sum = {};
      pixel.each([&](int64_t c, int64_t n) {
        const Vec centred = load_count(block + p * channels + c, n) - broadcast(means[p]);
        sum += centred * centred * (n == kLanes ? broadcast(1) : pixel.mask);
      });
      sums[p] = sum;
    }
    store(scales, sums_of_lanes(sums) * broadcast(pixel.share) + broadcast(eps));
    for (int64_t p = 0; p < kLanes; ++p) scales[p] = 1 / std::sqrt(scales[p]);
    for (int64_t p = 0; p < count; ++p) {
      pixel.each([&](int64_t c, int64_t n) {
        const Vec normal = (load_count(block + p * channels + c, n) - broadcast(means[p])) * broadcast(scales[p]);
        use(first + p, c, n, normal * load_count(weight + c, n) + load_count(bias + c, n));
      });
    }
  }
}

}  // namespace esc_arch
