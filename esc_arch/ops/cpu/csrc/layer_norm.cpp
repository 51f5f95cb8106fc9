// Layer normalisation over the channels of a map, forward and backward, in the layout the map has: vectors run along
// the channels of a pixel in channels_last, along the pixels of a channel otherwise. Nothing is copied to be permuted.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "memory.h"
#include "pixels.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

constexpr int64_t kStrip = 4;   // vectors of pixels taken through all channels at once where these lie apart
constexpr int64_t kFlush = 128;  // pixels summed before they join the total, which keeps rounding errors small

struct Map {
  int64_t batch, channels, pixels;
  bool channels_last;

  explicit Map(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)),
        channels_last(!x.is_contiguous() && x.is_channels_last()) {}

  Tensor laid_out(const Tensor& x) const {
    return channels_last ? x.channels_last() : x.contiguous();
  }

  int64_t units() const {  // of work: pixels, or strips of them
    return channels_last ? batch * pixels : batch * strips();
  }

  int64_t strips() const {
    return (pixels + kStrip * kLanes - 1) / (kStrip * kLanes);
  }

  int64_t grain() const {
    return std::max<int64_t>(1, 16384 / (1 + channels * (channels_last ? 1 : kStrip * kLanes)));
  }
};

// Sums over pixels that gradients of weight and bias are made of.
struct Sums {
  std::vector<float> weight, bias, weight_total, bias_total;

  explicit Sums(int64_t size) : weight(size), bias(size), weight_total(size), bias_total(size) {}

  void flush() {
    for (size_t i = 0; i < weight.size(); ++i) {
      weight_total[i] += weight[i];
      bias_total[i] += bias[i];
      weight[i] = bias[i] = 0;
    }
  }
};

// --- channels_last --------------------------------------------------------------------------------------------------

void normalise_pixels(int64_t begin, int64_t end, int64_t channels, const float* x, const float* weight,
                      const float* bias, float eps, float* y) {
  float* to = y + begin * channels;
  normalise(end - begin, channels, x + begin * channels, weight, bias, eps,
            [=](int64_t p, int64_t c, int64_t count, Vec value) { store_count(to + p * channels + c, value, count); });
}

// With n the normalised map and g = gradient * weight: gx = scale * (g - mean(g) - n * mean(g n)).
void backward_pixels(int64_t begin, int64_t end, int64_t channels, const float* gy, const float* x, const float* weight,
                     float eps, float* gx, Sums& sums) {
  const Pixel pixel(channels);
  for (int64_t p = begin; p < end; ++p) {
    const float *from = x + p * channels, *gradient = gy + p * channels;
    const Moments m = moments(pixel, from, eps);
    Vec sum = {}, product = {};
    pixel.each([&](int64_t c, int64_t count) {
      const Vec normal = (load_count(from + c, count) - broadcast(m.mean)) * broadcast(m.scale);
      const Vec g = load_count(gradient + c, count), weighted = g * load_count(weight + c, count);
      sum += weighted;
      product += weighted * normal;
      store(sums.weight.data() + c, load(sums.weight.data() + c) + g * normal);
      store(sums.bias.data() + c, load(sums.bias.data() + c) + g);
    });
    const Vec mean = broadcast(sum_of_lanes(sum) * pixel.share);
    const Vec along = broadcast(sum_of_lanes(product) * pixel.share);
    pixel.each([&](int64_t c, int64_t count) {
      const Vec normal = (load_count(from + c, count) - broadcast(m.mean)) * broadcast(m.scale);
      const Vec weighted = load_count(gradient + c, count) * load_count(weight + c, count);
      store_count(gx + p * channels + c, (weighted - mean - normal * along) * broadcast(m.scale), count);
    });
    if ((p - begin) % kFlush == kFlush - 1) sums.flush();
  }
}

// --- channels apart -------------------------------------------------------------------------------------------------

// use(offset of a strip of pixels in the whole map, how many pixels), strip by strip.
template <typename Use>
void for_strips(const Map& map, int64_t begin, int64_t end, Use use) {
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip % map.strips() * kStrip * kLanes;
    use(strip / map.strips() * map.channels * map.pixels + first, std::min(kStrip * kLanes, map.pixels - first));
  }
}

// use(first pixel, count, which) for every vector of a strip.
template <typename Use>
ESC_ARCH_INLINE void for_vectors(int64_t pixels, Use use) {
  for (int64_t v = 0; v * kLanes < pixels; ++v) use(v * kLanes, std::min(kLanes, pixels - v * kLanes), v);
}

ESC_ARCH_INLINE Vec inverse_root(Vec x) {
  Vec result;
  for (int64_t lane = 0; lane < kLanes; ++lane) result[lane] = 1 / std::sqrt(x[lane]);
  return result;
}

struct StripMoments {
  Vec mean[kStrip] = {}, scale[kStrip] = {};

  StripMoments(const Map& map, const float* x, int64_t pixels, float eps) {
    const Vec share = broadcast(1.0f / map.channels);
    for (int64_t c = 0; c < map.channels; ++c) {
      for_vectors(pixels, [&](int64_t p, int64_t count, int64_t v) { mean[v] += load_count(x + c * map.pixels + p, count); });
    }
    for (Vec& value : mean) value *= share;
    for (int64_t c = 0; c < map.channels; ++c) {
      for_vectors(pixels, [&](int64_t p, int64_t count, int64_t v) {
        const Vec centred = load_count(x + c * map.pixels + p, count) - mean[v];
        scale[v] += centred * centred;
      });
    }
    for (Vec& value : scale) value = inverse_root(value * share + broadcast(eps));
  }
};

void normalise_strip(const Map& map, int64_t pixels, const float* x, const float* weight, const float* bias, float eps,
                     float* y) {
  const StripMoments m(map, x, pixels, eps);
  for (int64_t c = 0; c < map.channels; ++c) {
    for_vectors(pixels, [&](int64_t p, int64_t count, int64_t v) {
      const Vec normal = (load_count(x + c * map.pixels + p, count) - m.mean[v]) * m.scale[v];
      store_count(y + c * map.pixels + p, normal * broadcast(weight[c]) + broadcast(bias[c]), count);
    });
  }
}

void backward_strip(const Map& map, int64_t pixels, const float* gy, const float* x, const float* weight, float eps,
                    float* gx, Sums& sums) {
  const StripMoments m(map, x, pixels, eps);
  Vec mean[kStrip] = {}, along[kStrip] = {};
  for (int64_t c = 0; c < map.channels; ++c) {
    Vec of_weight = {}, of_bias = {};
    for_vectors(pixels, [&](int64_t p, int64_t count, int64_t v) {
      const Vec g = load_count(gy + c * map.pixels + p, count);
      const Vec product = g * (load_count(x + c * map.pixels + p, count) - m.mean[v]) * m.scale[v];
      mean[v] += g * broadcast(weight[c]);
      along[v] += product * broadcast(weight[c]);
      of_weight += product;
      of_bias += g;
    });
    sums.weight[c] += sum_of_lanes(of_weight);
    sums.bias[c] += sum_of_lanes(of_bias);
  }
  const Vec share = broadcast(1.0f / map.channels);
  for (int64_t c = 0; c < map.channels; ++c) {
    for_vectors(pixels, [&](int64_t p, int64_t count, int64_t v) {
      const Vec normal = (load_count(x + c * map.pixels + p, count) - m.mean[v]) * m.scale[v];
      const Vec weighted = load_count(gy + c * map.pixels + p, count) * broadcast(weight[c]);
      store_count(gx + c * map.pixels + p, (weighted - (mean[v] + normal * along[v]) * share) * m.scale[v], count);
    });
  }
}

// --- operators ------------------------------------------------------------------------------------------------------

void check(const Tensor& x, const Tensor& weight) {
  require(x.dim() == 4 && x.is_float(), "layer_norm takes a float32 map (B, C, H, W) on the CPU");
  require(weight.numel() == x.size(1), "layer_norm's weight does not fit the map");
}

Tensor layer_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  check(input, weight);
  const Map map(input);
  const Tensor x = map.laid_out(input), w = weight.contiguous(), b = bias.contiguous();
  Tensor y = map.channels_last ? empty_map(x.sizes()) : empty(x.sizes());
  const float *from = x.data(), *scale = w.data(), *shift = b.data();
  float* to = y.data();
  parallel_for(0, map.units(), map.grain(), [&](int64_t begin, int64_t end) {
    if (map.channels_last) {
      normalise_pixels(begin, end, map.channels, from, scale, shift, eps, to);
    } else {
      for_strips(map, begin, end, [&](int64_t offset, int64_t pixels) {
        normalise_strip(map, pixels, from + offset, scale, shift, eps, to + offset);
      });
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const Tensor& weight, double eps) {
  check(input, weight);
  require(grad.sizes() == input.sizes(), "layer_norm_backward: the gradient has not the shape of the map");
  const Map map(input);
  const Tensor x = map.laid_out(input), gy = map.laid_out(grad), w = weight.contiguous();
  Tensor gx = map.channels_last ? empty_channels_last(x.sizes()) : empty(x.sizes());
  Tensor gw = zeros({map.channels}), gb = zeros({map.channels});
  const float *from = x.data(), *gradient = gy.data();
  const float* scale = w.data();
  float* to = gx.data();
  const int64_t units = map.units(), most = get_num_threads();
  const int64_t parts = std::clamp<int64_t>(units / map.grain(), 1, most);
  std::vector<Sums> sums(parts, Sums(padded(map.channels)));
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = units * part / parts, end = units * (part + 1) / parts;
      if (map.channels_last) {
        backward_pixels(begin, end, map.channels, gradient, from, scale, eps, to, sums[part]);
      } else {
        for_strips(map, begin, end, [&](int64_t offset, int64_t pixels) {
          backward_strip(map, pixels, gradient + offset, from + offset, scale, eps, to + offset, sums[part]);
        });
      }
      sums[part].flush();
    }
  });
  float *of_weight = gw.data(), *of_bias = gb.data();
  for (const Sums& part : sums) {  // in their order, so that the result is the same every time
    for (int64_t c = 0; c < map.channels; ++c) {
      of_weight[c] += part.weight_total[c];
      of_bias[c] += part.bias_total[c];
    }
  }
  return {gx, gw, gb};
}

}  // namespace
}  // namespace esc_arch

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def("layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("layer_norm_backward_cpu(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("layer_norm_cpu", ESC_ARCH_KERNEL(esc_arch::layer_norm));
  m.impl("layer_norm_backward_cpu", ESC_ARCH_KERNEL(esc_arch::layer_norm_backward));
}
