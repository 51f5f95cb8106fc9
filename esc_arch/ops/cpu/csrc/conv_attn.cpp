// ConvAttn's operators, from its two convolutions alone to the whole layer with its gradients. How the convolutions are
// done is in conv_attn_tiles.h.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "conv_attn_tiles.h"
#include "matrices.h"
#include "memory.h"
#include "pixels.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

Tensor empty_map_like(const Tensor& x) {
  const bool channels_last = x.stride(1) == 1 && x.size(1) > 1;
  return channels_last ? empty_map(x.sizes()) : empty(x.sizes());
}

void check_inputs(const Tensor& x, const Tensor& large_kernel, const Tensor& dynamic_kernel) {
  for (const Tensor& tensor : {x, large_kernel, dynamic_kernel})
    require(tensor.dim() == 4 && tensor.is_float(),
            "conv_attention takes float32 tensors of four dimensions on the CPU.");
  const int64_t channels = x.size(1), side = large_kernel.size(3), dynamic_side = dynamic_kernel.size(3);
  require(large_kernel.sizes() == Dimensions{channels, channels, side, side} && side % 2 == 1 &&
              dynamic_kernel.sizes() == Dimensions{x.size(0), channels, dynamic_side, dynamic_side} &&
              dynamic_side % 2 == 1,
          "conv_attention: kernels of shapes ", large_kernel.sizes(), " and ", dynamic_kernel.sizes(),
          " do not fit x of shape ", x.sizes(), ".");
}

// Threads get contiguous shares of the pairs, so that sums come out the same at every call
template <typename Job>
int64_t in_shares(int64_t pairs, const Job& job) {
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(pairs, get_num_threads()));
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share)
      for (int64_t pair = pairs * share / shares; pair < pairs * (share + 1) / shares; ++pair) job(share, pair);
  });
  return shares;
}

void convolve(const Tensor& x, const Tensor& large_kernel, const Tensor& dynamic_kernel,
              const Tensor& out, const Mixer* mixer) {
  const int64_t side = dynamic_kernel.size(3);
  const Tiling t = choose_tiling(x, large_kernel.size(3), side);
  static thread_local Scratch kernel_scratch;
  float* matrices = kernel_scratch.get(t.half_y() * t.half_x() * t.matrix());
  kernel_matrices(t, large_kernel, matrices);
  const auto taps = arranged_taps(t, dynamic_kernel, false);
  const Map from(x), to(out);
  const int64_t mixed_row = mixer == nullptr ? 0 : t.valid_x() * mixer->step();
  in_shares(t.pairs(), [&](int64_t, int64_t pair) {
    static thread_local Scratch scratch;
    const int64_t stage = t.blocks * t.stage_block(), spectral = t.blocks * t.spectrum_block();
    const int64_t both_lines = t.blocks * 2 * t.stage_row();
    float* staged = scratch.get(2 * stage + spectral + both_lines + 16 * t.padded() + mixed_row);
    float *spectrum = staged + 2 * stage, *lines = spectrum + spectral, *rows = lines + both_lines;
    const Tile tiles[2] = {Tile(t, pair, 0), Tile(t, pair, 1)};
    Range used = stage_tile(t, from, tiles[0], true, staged);
    const Range second = stage_tile(t, from, tiles[1], true, staged + stage);
    if (tiles[1].exists) used = {std::min(used.begin, second.begin), std::max(used.end, second.end)};
    transform_rows(t, staged, staged + stage, used, spectrum);
    visit_frequencies(t, spectrum, matrices, nullptr, nullptr, rows);
    from_spectrum(t, spectrum, tiles, {staged, staged + stage}, taps.data(), side, to, mixer, lines,
                  rows + 16 * t.padded());
  });
}

// The channels that the kernels are for: the first ones
Tensor convolved_part(const Tensor& x, const Tensor& large_kernel) {
  require(x.dim() == 4 && large_kernel.dim() == 4 && x.size(1) >= large_kernel.size(0),
          "conv_attention: a kernel of shape ", large_kernel.sizes(), " does not fit x of shape ", x.sizes(), ".");
  return x.narrow(1, 0, large_kernel.size(0));
}

void copy_others(const Tensor& from, int64_t channels, Tensor& to) {
  const int64_t others = from.size(1) - channels;
  if (others > 0) from.narrow(1, channels, others).copy_to(to.narrow(1, channels, others));
}

// The first channels convolved, the others as they are
Tensor conv_attention(const Tensor& x, const Tensor& large_kernel, const Tensor& dynamic_kernel) {
  const Tensor convolved = convolved_part(x, large_kernel);
  check_inputs(convolved, large_kernel, dynamic_kernel);
  Tensor out = empty_map_like(x);
  if (out.numel() == 0) return out;
  copy_others(x, convolved.size(1), out);
  if (convolved.numel() != 0) convolve(convolved, large_kernel, dynamic_kernel, convolved_part(out, large_kernel),
                                       nullptr);
  return out;
}

// The first channels convolved, the others as they are, a 1 x 1 convolution of all, and what is added to that, without
// putting the channels together. `kept` gets the convolved channels, unless it is null.
Tensor convolve_and_mix(const Tensor& x, const std::optional<Tensor>& residual,
                        const Tensor& large_kernel, const Tensor& dynamic_kernel, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor* kept) {
  const Tensor convolved = convolved_part(x, large_kernel);
  check_inputs(convolved, large_kernel, dynamic_kernel);
  require(x.stride(1) == 1, "conv_attention_fused takes maps with the channels innermost.");
  require(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1 &&
              weight.is_float() &&
              (!bias || (bias->sizes() == Dimensions{weight.size(0)} && bias->is_float())),
          "conv_attention_fused: a weight of shape ", weight.sizes(), " does not fit x of shape ", x.sizes(), ".");
  Tensor out = empty_map({x.size(0), weight.size(0), x.size(2), x.size(3)});
  require(!residual || (residual->sizes() == out.sizes() && residual->stride(1) == 1 && residual->is_float()),
          "conv_attention_fused: the residual must be as the output, with the channels innermost.");
  if (out.numel() == 0) return out;
  const Mixer mixer(x, residual, out, weight, bias, kept);
  convolve(convolved, large_kernel, dynamic_kernel, out, &mixer);
  return out;
}

// --- the kernel that is computed from the image -------------------------------------------------------------------

constexpr int64_t kDynamicSide = 3;
using Numbers = std::vector<double>;

// The means of a map's first channels over all pixels: (images, channels). Rows are summed by themselves, so that the
// number of threads makes no difference.
Tensor means_of_first(const Tensor& x, int64_t channels) {
  const int64_t images = x.size(0), height = x.size(2), width = x.size(3), step = padded(channels);
  const Map map(x);
  Floats sums(images * height * step);
  parallel_for(0, images * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const float* from = map.at(row / height, row % height, 0) + c;
        const Vec sum = sum_of_pixels(from, width, map.column, std::min(kLanes, channels - c));
        store(sums.data() + row * step + c, sum);
      }
  });
  Tensor means = empty({images, channels});
  for (int64_t image = 0; image < images; ++image)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t row = 0; row < height; ++row) sum += sums[(image * height + row) * step + c];
      means.data()[image * channels + c] = static_cast<float>(sum / (height * width));
    }
  return means;
}

// (images, inputs) through a linear layer of a weight (outputs, inputs, 1, 1): (images, outputs)
Numbers linear(const Numbers& values, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), images = values.size() / inputs;
  const Map map(weight);
  Numbers result(images * outputs);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias ? bias->data()[o * bias->stride(0)] : 0;
      for (int64_t i = 0; i < inputs; ++i)
        sum += values[image * inputs + i] * map.data[o * map.batch + i * map.channel];
      result[image * outputs + o] = sum;
    }
  return result;
}

struct LinearGradients {
  Numbers of_values;
  Tensor of_weight, of_bias;
};

// From that of its result, (images, outputs)
LinearGradients linear_backward(const Numbers& gradient, const Numbers& values, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), images = values.size() / inputs;
  const Map map(weight);
  Numbers of_values(values.size()), of_weight(outputs * inputs), of_bias(outputs);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t o = 0; o < outputs; ++o) {
      const double of_output = gradient[image * outputs + o];
      of_bias[o] += of_output;
      for (int64_t i = 0; i < inputs; ++i) {
        of_weight[o * inputs + i] += of_output * values[image * inputs + i];
        of_values[image * inputs + i] += of_output * map.data[o * map.batch + i * map.channel];
      }
    }
  const auto as_tensor = [&](const Numbers& numbers, const Dimensions& sizes) {
    const Tensor tensor = empty(sizes);
    std::copy(numbers.begin(), numbers.end(), tensor.data());
    return tensor;
  };
  return {of_values, as_tensor(of_weight, weight.sizes()), as_tensor(of_bias, {outputs})};
}

void check_linear(const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs, int64_t inputs) {
  require(weight.sizes() == Dimensions{outputs, inputs, 1, 1} && weight.is_float() &&
              (!bias || (bias->sizes() == Dimensions{outputs} && bias->is_float())),
          "conv_attention_fused: a projection of shape ", weight.sizes(), " where ", outputs, " x ", inputs,
          " x 1 x 1, and a bias to it, are needed.");
}

// (B, C) of any strides as numbers, image after image
Numbers numbers_of(const Tensor& means) {
  const int64_t channels = means.size(1);
  Numbers numbers(means.numel());
  for (size_t i = 0; i < numbers.size(); ++i)
    numbers[i] = means.data()[i / channels * means.stride(0) + i % channels * means.stride(1)];
  return numbers;
}

double gelu_of(double x) { return x * 0.5 * std::erfc(-x * M_SQRT1_2); }

double gelu_slope_of(double x) {
  return 0.5 * std::erfc(-x * M_SQRT1_2) + x * std::exp(-0.5 * x * x) * 0.5 * M_2_SQRTPI * M_SQRT1_2;
}

template <typename Function>
Numbers of_each(Numbers numbers, Function function) {
  for (double& number : numbers) number = function(number);
  return numbers;
}

// The small kernel of each image, (B, C, 3, 3), from the means of its channels, (B, C)
Tensor dynamic_kernel_of(const Tensor& means, int64_t channels, const Tensor& proj1_weight,
                         const std::optional<Tensor>& proj1_bias, const Tensor& proj2_weight,
                         const std::optional<Tensor>& proj2_bias) {
  check_linear(proj1_weight, proj1_bias, proj1_weight.size(0), channels);
  check_linear(proj2_weight, proj2_bias, channels * kDynamicSide * kDynamicSide, proj1_weight.size(0));
  const Numbers hidden = of_each(linear(numbers_of(means), proj1_weight, proj1_bias), gelu_of);
  const Numbers taps = linear(hidden, proj2_weight, proj2_bias);
  const Tensor kernel = empty({means.size(0), channels, kDynamicSide, kDynamicSide});
  std::copy(taps.begin(), taps.end(), kernel.data());
  return kernel;
}

// --- a whole ConvAttn ----------------------------------------------------------------------------------------------

// Without gradients; `means` may have come with the map
Tensor conv_attention_fused(const Tensor& x, const std::optional<Tensor>& residual,
                            const Tensor& large_kernel, const std::optional<Tensor>& means,
                            const Tensor& proj1_weight, const std::optional<Tensor>& proj1_bias,
                            const Tensor& proj2_weight, const std::optional<Tensor>& proj2_bias,
                            const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor convolved = convolved_part(x, large_kernel);
  const int64_t channels = convolved.size(1);
  require(!means || (means->sizes() == Dimensions{x.size(0), channels} && means->is_float()),
          "conv_attention_fused: the means do not fit x of shape ", x.sizes(), ".");
  require(x.is_float() && x.stride(1) == 1, "conv_attention_fused takes maps with the channels innermost.");
  const Tensor kernel = dynamic_kernel_of(means ? *means : means_of_first(x, channels), channels, proj1_weight,
                                          proj1_bias, proj2_weight, proj2_bias);
  return convolve_and_mix(x, residual, large_kernel, kernel, weight, bias, nullptr);
}

// To be trained: also what its gradients need, which are the convolved channels, the small kernels and the means
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_attention_fused_training(
    const Tensor& input, const std::optional<Tensor>& residual, const Tensor& large_kernel,
    const Tensor& proj1_weight, const std::optional<Tensor>& proj1_bias, const Tensor& proj2_weight,
    const std::optional<Tensor>& proj2_bias, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor x = input.channels_last();
  const Tensor first = convolved_part(x, large_kernel);
  require(x.is_float(), "conv_attention_fused_training takes float32 tensors on the CPU.");
  const Tensor means = means_of_first(x, first.size(1));
  const Tensor kernel = dynamic_kernel_of(means, first.size(1), proj1_weight, proj1_bias, proj2_weight, proj2_bias);
  const Tensor convolved = empty_map(first.sizes());
  return {convolve_and_mix(x, residual, large_kernel, kernel, weight, bias, &convolved), convolved, kernel, means};
}

// --- gradients of the convolutions ----------------------------------------------------------------------------------

struct KernelGradients {
  Tensor large, dynamic;  // empty where they are not wanted
};

// `to` gets the gradient of x, unless it is null
KernelGradients differentiate_convolutions(const Tensor& gradient, const Tensor& x, const Tensor& large_kernel,
                                           const Tensor& dynamic_kernel, const Tensor* to, bool of_kernels) {
  Tensor large_gradient = of_kernels ? zeros(large_kernel.sizes()) : empty({0});
  Tensor dynamic_gradient = of_kernels ? zeros(dynamic_kernel.sizes()) : empty({0});
  if (x.numel() == 0) return {large_gradient, dynamic_gradient};

  const int64_t side = dynamic_kernel.size(3), count = side * side;
  const Tiling t = choose_tiling(x, large_kernel.size(3), side);
  const int64_t all_matrices = t.half_y() * t.half_x() * t.matrix();
  static thread_local Scratch kernel_scratch, sum_scratch;
  float* matrices = nullptr;
  if (to) {
    matrices = kernel_scratch.get(all_matrices);
    kernel_matrices(t, large_kernel.transpose(0, 1), matrices);
  }
  const int64_t most_shares = std::max<int64_t>(1, std::min<int64_t>(t.pairs(), get_num_threads()));
  float* sums = nullptr;
  std::vector<float> tap_sums;
  if (of_kernels) {
    sums = sum_scratch.get(most_shares * all_matrices);
    std::memset(sums, 0, most_shares * all_matrices * sizeof(float));
    tap_sums.resize(t.tiles() * count * t.padded());
  }
  const auto taps = arranged_taps(t, dynamic_kernel, true);
  const Map of_output(gradient), of_input(x), target(to ? *to : x);
  const int64_t shares = in_shares(t.pairs(), [&](int64_t share, int64_t pair) {
    static thread_local Scratch scratch;
    const int64_t stage = t.blocks * t.stage_block(), spectral = t.blocks * t.spectrum_block();
    float* staged = scratch.get(4 * stage + 2 * spectral + t.blocks * 2 * t.stage_row() + 16 * t.padded());
    float *staged_x = staged + 2 * stage, *spectrum = staged + 4 * stage, *spectrum_x = spectrum + spectral;
    float *lines = spectrum_x + spectral, *rows = lines + t.blocks * 2 * t.stage_row();
    const Tile tiles[2] = {Tile(t, pair, 0), Tile(t, pair, 1)};
    Range used{t.y.points, 0}, used_x{t.y.points, 0};
    for (int i = 0; i < 2; ++i) {
      const Range range = stage_tile(t, of_output, tiles[i], true, staged + i * stage);
      if (tiles[i].exists) used = {std::min(used.begin, range.begin), std::max(used.end, range.end)};
      if (!of_kernels) continue;
      // Each input belongs to one tile, while the gradients that it meets may lie in the rim
      const Range range_x = stage_tile(t, of_input, tiles[i], false, staged_x + i * stage);
      if (!tiles[i].exists) continue;
      used_x = {std::min(used_x.begin, range_x.begin), std::max(used_x.end, range_x.end)};
      correlate_dynamic(t, staged_x + i * stage, staged + i * stage, side, range_x,
                        tap_sums.data() + tiles[i].index * count * t.padded());
    }
    transform_rows(t, staged, staged + stage, used, spectrum);
    if (of_kernels) transform_rows(t, staged_x, staged_x + stage, used_x, spectrum_x);
    visit_frequencies(t, spectrum, matrices, of_kernels ? spectrum_x : nullptr,
                      of_kernels ? sums + share * all_matrices : nullptr, rows);
    if (to) from_spectrum(t, spectrum, tiles, {staged, staged + stage}, taps.data(), side, target, nullptr, lines,
                          nullptr);
  });
  if (of_kernels) {
    kernel_gradient(t, sums, shares, large_gradient);
    const Map result(dynamic_gradient);
    for (int64_t tile = 0; tile < t.tiles(); ++tile)
      for (int64_t tap = 0; tap < count; ++tap)
        for (int64_t c = 0; c < t.channels; ++c)
          result.data[tile / (t.rows * t.columns) * result.batch + c * result.channel + tap] +=
              tap_sums[(tile * count + tap) * t.padded() + c];
  }
  return {large_gradient, dynamic_gradient};
}

std::tuple<Tensor, Tensor, Tensor> conv_attention_backward(
    const Tensor& whole_gradient, const Tensor& whole_x, const Tensor& large_kernel,
    const Tensor& dynamic_kernel, bool of_x, bool of_kernels) {
  const Tensor x = convolved_part(whole_x, large_kernel);
  check_inputs(x, large_kernel, dynamic_kernel);
  require(whole_gradient.sizes() == whole_x.sizes() && whole_gradient.is_float(),
          "conv_attention_backward: the gradient does not fit x.");
  Tensor x_gradient = of_x ? empty_map_like(whole_x) : empty({0});
  if (of_x) copy_others(whole_gradient, x.size(1), x_gradient);
  const Tensor to = of_x ? convolved_part(x_gradient, large_kernel) : Tensor();
  const KernelGradients of_kernel =
      differentiate_convolutions(convolved_part(whole_gradient, large_kernel), x, large_kernel, dynamic_kernel,
                                 of_x ? &to : nullptr, of_kernels);
  return {x_gradient, of_kernel.large, of_kernel.dynamic};
}

// --- gradients of the whole layer -----------------------------------------------------------------------------------

constexpr int64_t kPiece = 64;  // pixels that are worked on at a time: they stay in the first cache

// The 1 x 1 convolution of the convolved channels and the others, backwards. All maps are pixel after pixel.
struct Unmixing {
  int64_t channels, inputs, outputs;  // convolved; all; of the convolution
  const float *gradient, *x, *convolved, *weight;  // (weight: output after output, its inputs padded)
  float *of_convolved, *of_x;

  int64_t step() const { return padded(inputs); }
};

// Gradients of the weight, (outputs, padded inputs), and of the bias, as one part of the work sums them
struct MixGradients {
  Floats weight, bias;

  explicit MixGradients(const Unmixing& u) : weight(u.outputs * u.step()), bias(padded(u.outputs)) {}
};

// The gradients of a piece's channels: of the convolved ones apart; those of the others in their place, with something
// in the place of the convolved ones
void unmix(const Unmixing& u, int64_t begin, int64_t pixels) {
  const int64_t channels = u.channels, inputs = u.inputs;
  float *of_convolved = u.of_convolved + begin * channels, *of_x = u.of_x + begin * inputs;
  product(pixels, u.step() / kLanes, u.outputs, {u.gradient + begin * u.outputs, u.outputs, 1}, u.weight, u.step(),
          nullptr, [=](int64_t p, int64_t v, Vec sum) {
            if (v * kLanes < channels) store_channels(of_convolved + p * channels, v, channels, sum);
            if ((v + 1) * kLanes > channels) store_channels(of_x + p * inputs, v, inputs, sum);
          });
}

void add_mix_gradients(const Unmixing& u, int64_t begin, int64_t pixels, Floats& joined, MixGradients& sums) {
  const int64_t step = u.step();
  for (int64_t p = 0; p < pixels; ++p) {
    float* to = joined.data() + p * step;
    std::memcpy(to, u.convolved + (begin + p) * u.channels, u.channels * sizeof(float));
    std::memcpy(to + u.channels, u.x + (begin + p) * u.inputs + u.channels, (u.inputs - u.channels) * sizeof(float));
  }
  const float* gradient = u.gradient + begin * u.outputs;
  float* of_weight = sums.weight.data();
  product(u.outputs, step / kLanes, pixels, {gradient, 1, u.outputs}, joined.data(), step, nullptr,
          [=](int64_t o, int64_t v, Vec sum) {
            float* place = of_weight + o * step + v * kLanes;
            store(place, load(place) + sum);
          });
  for (int64_t c = 0; c < u.outputs; c += kLanes) {
    const Vec sum = sum_of_pixels(gradient + c, pixels, u.outputs, std::min(kLanes, u.outputs - c));
    store(sums.bias.data() + c, load(sums.bias.data() + c) + sum);
  }
}

// All pixels of the batch
MixGradients unmix_all(const Unmixing& u, int64_t pixels, bool of_parameters) {
  const int64_t parts = std::clamp<int64_t>(pixels / (4 * kPiece), 1, get_num_threads());
  std::vector<MixGradients> sums;
  for (int64_t part = 0; part < parts; ++part) sums.emplace_back(u);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    Floats joined(kPiece * u.step());
    for (int64_t part = first; part < last; ++part) {
      const int64_t end = pixels * (part + 1) / parts;
      for (int64_t begin = pixels * part / parts; begin < end; begin += kPiece) {
        const int64_t count = std::min(kPiece, end - begin);
        unmix(u, begin, count);
        if (of_parameters) add_mix_gradients(u, begin, count, joined, sums[part]);
      }
    }
  });
  return std::move(sum_of_parts(sums, &MixGradients::weight, &MixGradients::bias));
}

// What every pixel of an image gets, (B, C), added to the first channels of a map
void add_to_first(Tensor& map, const Numbers& numbers, int64_t channels) {
  const int64_t images = map.size(0), pixels = map.size(2) * map.size(3), inputs = map.size(1);
  Floats values(images * padded(channels));
  for (size_t i = 0; i < numbers.size(); ++i)
    values[i / channels * padded(channels) + i % channels] = static_cast<float>(numbers[i]);
  float* data = map.data();
  parallel_for(0, images * pixels, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t count = std::min(kLanes, channels - c);
        float* place = data + p * inputs + c;
        store_count(place, load_count(place, count) + load(values.data() + p / pixels * padded(channels) + c), count);
      }
  });
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients of x, the large kernel, and weight and bias of both projections and of the 1 x 1 convolution
EightTensors conv_attention_fused_backward(const Tensor& whole_gradient, const Tensor& input,
                                           const Tensor& large_kernel, const Tensor& proj1_weight,
                                           const std::optional<Tensor>& proj1_bias, const Tensor& proj2_weight,
                                           const Tensor& weight, const Tensor& kept, const Tensor& dynamic,
                                           const Tensor& means, bool of_parameters) {
  const Tensor x = input.channels_last();
  const Tensor gradient = whole_gradient.channels_last();
  const Tensor convolved = kept.channels_last();
  const Tensor first = convolved_part(x, large_kernel);
  check_inputs(first, large_kernel, dynamic);
  require(gradient.is_float() && weight.is_float() && convolved.sizes() == first.sizes() &&
              gradient.sizes() == Dimensions{x.size(0), weight.size(0), x.size(2), x.size(3)},
          "conv_attention_fused_backward: the gradient does not fit x.");
  Tensor x_gradient = empty_map(x.sizes());
  const Tensor of_convolved = empty_map(first.sizes());
  const int64_t channels = first.size(1), inputs = x.size(1), outputs = weight.size(0);

  const Floats rows = packed(as_matrix(weight));
  const Unmixing unmixing{channels, inputs, outputs, gradient.data(), x.data(),
                          convolved.data(), rows.data(), of_convolved.data(),
                          x_gradient.data()};
  const MixGradients of_mix = unmix_all(unmixing, x.numel() / std::max<int64_t>(inputs, 1), of_parameters);

  const Tensor to = convolved_part(x_gradient, large_kernel);
  // The small kernel's gradient is part of that of x: through the means
  const KernelGradients of_kernels = differentiate_convolutions(of_convolved, first, large_kernel, dynamic, &to, true);
  const Numbers values = numbers_of(means), before = linear(values, proj1_weight, proj1_bias);
  const Tensor taps = of_kernels.dynamic.contiguous();
  const Numbers of_taps(taps.data(), taps.data() + taps.numel());
  const LinearGradients of_proj2 = linear_backward(of_taps, of_each(before, gelu_of), proj2_weight);
  Numbers of_before = of_each(before, gelu_slope_of);
  for (size_t i = 0; i < of_before.size(); ++i) of_before[i] *= of_proj2.of_values[i];
  const LinearGradients of_proj1 = linear_backward(of_before, values, proj1_weight);
  const double share = 1.0 / (x.size(2) * x.size(3));
  add_to_first(x_gradient, of_each(of_proj1.of_values, [=](double value) { return value * share; }), channels);

  return {x_gradient,
          of_kernels.large,
          of_proj1.of_weight,
          of_proj1.of_bias,
          of_proj2.of_weight,
          of_proj2.of_bias,
          unpacked(of_mix.weight, outputs, inputs, false, weight.sizes()),
          unpacked(of_mix.bias, 1, outputs, false, {outputs})};
}

}  // namespace
}  // namespace esc_arch

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, library) {
  library.def("conv_attention_cpu(Tensor x, Tensor large_kernel, Tensor dynamic_kernel) -> Tensor");
  library.def(
      "conv_attention_fused_cpu(Tensor x, Tensor? residual, Tensor large_kernel, Tensor? means, Tensor proj1_weight, "
      "Tensor? proj1_bias, Tensor proj2_weight, Tensor? proj2_bias, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "conv_attention_fused_training_cpu(Tensor x, Tensor? residual, Tensor large_kernel, Tensor proj1_weight, "
      "Tensor? proj1_bias, Tensor proj2_weight, Tensor? proj2_bias, Tensor weight, Tensor? bias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "conv_attention_fused_backward_cpu(Tensor gradient, Tensor x, Tensor large_kernel, Tensor proj1_weight, "
      "Tensor? proj1_bias, Tensor proj2_weight, Tensor weight, Tensor convolved, Tensor dynamic_kernel, Tensor means, "
      "bool of_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "conv_attention_backward_cpu(Tensor gradient, Tensor x, Tensor large_kernel, Tensor dynamic_kernel, bool of_x, "
      "bool of_kernels) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, library) {
  library.impl("conv_attention_cpu", ESC_ARCH_KERNEL(esc_arch::conv_attention));
  library.impl("conv_attention_fused_cpu", ESC_ARCH_KERNEL(esc_arch::conv_attention_fused));
  library.impl("conv_attention_fused_training_cpu", ESC_ARCH_KERNEL(esc_arch::conv_attention_fused_training));
  library.impl("conv_attention_fused_backward_cpu", ESC_ARCH_KERNEL(esc_arch::conv_attention_fused_backward));
  library.impl("conv_attention_backward_cpu", ESC_ARCH_KERNEL(esc_arch::conv_attention_backward));
}
