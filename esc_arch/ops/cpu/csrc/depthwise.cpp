// Depth-wise convolution with zero padding where each image has filters of its own, and its gradients.
//
// Vectors run over channels. A tile of the map with its margins is laid out as [row][column][kLanes], zeros outside the
// map, so that nothing further on needs to look at borders; sums of several outputs, or taps, stay in registers.

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "memory.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

constexpr int64_t kRows = 32, kColumns = 64;  // of a tile's outputs: with the margins of a 13 x 13 filter 214 kB
constexpr int64_t kGroup = kTileColumns == 2 ? 4 : 8;  // neighbouring outputs of two rows whose sums are in registers
constexpr int64_t kMostTaps = kTileColumns == 2 ? 5 : 7;  // neighbouring taps of two rows, likewise

struct Sizes {
  int64_t batch, channels, height, width, side, margin, blocks;
  int64_t tile_rows, tile_columns;  // number of tiles
  int64_t stage_row;                // floats

  Sizes(const Tensor& x, const Tensor& kernel)
      : batch(x.size(0)), channels(x.size(1)), height(x.size(2)), width(x.size(3)), side(kernel.size(2)),
        margin(side / 2), blocks(padded(channels) / kLanes), tile_rows((height + kRows - 1) / kRows),
        tile_columns((width + kColumns - 1) / kColumns), stage_row((kColumns + 2 * margin) * kLanes) {}

  int64_t taps() const { return side * side; }
  int64_t tiles() const { return tile_rows * tile_columns; }
  int64_t jobs() const { return batch * blocks * tiles(); }
  int64_t stage() const { return (kRows + 2 * margin) * stage_row; }
};

struct Job {
  int64_t filter;  // image and block of channels
  int64_t image, block, lanes, top, left, rows, columns;

  Job(const Sizes& s, int64_t index)
      : filter(index / s.tiles()), image(filter / s.blocks), block(filter % s.blocks),
        lanes(std::min(kLanes, s.channels - block * kLanes)), top(index % s.tiles() / s.tile_columns * kRows),
        left(index % s.tile_columns * kColumns), rows(std::min(kRows, s.height - top)),
        columns(std::min(kColumns, s.width - left)) {}
};

Tensor channels_innermost(const Tensor& map) {
  return map.stride(1) == 1 ? map : map.channels_last();
}

// A tile and `margin` pixels around it, in rows of `step` floats
void stage(const Sizes& s, const Job& job, const Tensor& map, int64_t margin, int64_t step, float* to) {
  const int64_t row_step = map.stride(2), pixel_step = map.stride(3);
  const float* from = map.data() + job.image * map.stride(0) + job.block * kLanes;
  const int64_t first = std::max<int64_t>(job.left - margin, 0);
  const int64_t last = std::min(job.left + kColumns + margin, s.width);
  const int64_t zeros = (first - (job.left - margin)) * kLanes, filled = zeros + (last - first) * kLanes;
  for (int64_t y = job.top - margin; y < job.top + kRows + margin; ++y, to += step) {
    if (y < 0 || y >= s.height) {
      std::fill_n(to, step, 0.0f);
      continue;
    }
    std::fill(to, to + zeros, 0.0f);
    std::fill(to + filled, to + step, 0.0f);
    const float* pixel = from + y * row_step + first * pixel_step;
    for (float* at = to + zeros; at < to + filled; at += kLanes, pixel += pixel_step)
      store(at, job.lanes == kLanes ? load(pixel) : load_first(pixel, job.lanes));
  }
}

// Filters (B, C, side, side) as [image][block][tap][kLanes], for the gradient of x turned by 180 degrees
std::vector<float> arranged(const Sizes& s, const Tensor& kernel, bool turned) {
  const Tensor plain = kernel.contiguous();
  const float* from = plain.data();
  std::vector<float> result(s.batch * s.blocks * s.taps() * kLanes);
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t place = turned ? s.taps() - 1 - tap : tap;
        const int64_t vector = (image * s.blocks + c / kLanes) * s.taps() + place;
        result[vector * kLanes + c % kLanes] = from[(image * s.channels + c) * s.taps() + tap];
      }
  return result;
}

// kGroup outputs of two rows, the second below the first. (A function of its own, lest the sums be spilled.)
__attribute__((noinline)) void filter_group(const Sizes& s, const float* staged, const float* taps, float* result) {
  Vec sums[2][kGroup] = {};
  const int64_t side = s.side;
  for (int64_t row = 0; row <= side; ++row, staged += s.stage_row) {
    const float* upper = taps + row * side * kLanes;
    const float* lower = upper - side * kLanes;
    const auto add = [&]<bool UPPER, bool LOWER>(std::bool_constant<UPPER>, std::bool_constant<LOWER>) {
      for (int64_t tap = 0; tap < side; ++tap) {
        const Vec first = UPPER ? load(upper + tap * kLanes) : Vec{};
        const Vec second = LOWER ? load(lower + tap * kLanes) : Vec{};
#pragma GCC unroll 8
        for (int64_t i = 0; i < kGroup; ++i) {
          const Vec value = load(staged + (tap + i) * kLanes);
          if constexpr (UPPER) sums[0][i] += value * first;
          if constexpr (LOWER) sums[1][i] += value * second;
        }
      }
    };
    if (row == 0)
      add(std::true_type{}, std::false_type{});
    else if (row == side)
      add(std::false_type{}, std::true_type{});
    else
      add(std::true_type{}, std::true_type{});
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < 2 * kGroup; ++i) store(result + i * kLanes, sums[i / kGroup][i % kGroup]);
}

void filter(const Sizes& s, const Tensor& map, const std::vector<float>& taps, const Tensor& out) {
  float* const to = out.data();
  parallel_for(0, s.jobs(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> staged(s.stage() + s.stage_row);
    float result[2 * kGroup * kLanes];
    for (int64_t index = begin; index < end; ++index) {
      const Job job(s, index);
      stage(s, job, map, s.margin, s.stage_row, staged.data());
      for (int64_t y = 0; y < job.rows; y += 2)
        for (int64_t x = 0; x < job.columns; x += kGroup) {
          filter_group(s, staged.data() + y * s.stage_row + x * kLanes, taps.data() + job.filter * s.taps() * kLanes,
                       result);
          for (int64_t row = y; row < std::min(y + 2, job.rows); ++row)
            for (int64_t i = 0; i < std::min(kGroup, job.columns - x); ++i) {
              const int64_t pixel = (job.image * s.height + job.top + row) * s.width + job.left + x + i;
              const Vec value = load(result + ((row - y) * kGroup + i) * kLanes);
              float* at = to + pixel * s.channels + job.block * kLanes;
              if (job.lanes == kLanes)
                store(at, value);
              else
                store_first(at, value, job.lanes);
            }
        }
    }
  });
}

// result[i][j] = sum over all pixels of input(y + i, x + j) gradient(y, x), for i < 2 and j < N.
// The rows of gradients lie between two of zeros.
template <int64_t N>
__attribute__((noinline)) void correlate(const Sizes& s, int64_t rows, int64_t columns, const float* input,
                                         const float* gradient, float* result) {
  constexpr int64_t step = kColumns * kLanes, summed_rows = 2;  // in one go, or the sums lose too many bits
  std::fill_n(result, 2 * N * kLanes, 0.0f);
  for (int64_t first_row = 0; first_row <= rows; first_row += summed_rows) {
    Vec sums[2][N] = {};
    for (int64_t y = first_row; y < std::min(first_row + summed_rows, rows + 1); ++y)
      for (int64_t x = 0; x < columns; ++x) {
        const float* const above = gradient + y * step + x * kLanes;
        const Vec second = load(above), first = load(above + step);
#pragma GCC unroll 8
        for (int64_t j = 0; j < N; ++j) {
          const Vec value = load(input + y * s.stage_row + (x + j) * kLanes);
          sums[0][j] += value * first;
          sums[1][j] += value * second;
        }
      }
#pragma GCC unroll 16
    for (int64_t j = 0; j < N; ++j) {
      store(result + j * kLanes, load(result + j * kLanes) + sums[0][j]);
      store(result + (N + j) * kLanes, load(result + (N + j) * kLanes) + sums[1][j]);
    }
  }
}

using Correlate = void (*)(const Sizes&, int64_t, int64_t, const float*, const float*, float*);

template <size_t... N>
constexpr std::array<Correlate, sizeof...(N)> correlations(std::index_sequence<N...>) {
  return {&correlate<static_cast<int64_t>(N) + 1>...};
}

// The gradient of the filters from one tile, [tap][kLanes]
void correlate_tile(const Sizes& s, const Job& job, const float* input, const float* gradient, float* to) {
  static constexpr auto functions = correlations(std::make_index_sequence<kMostTaps>());
  float result[2 * kMostTaps * kLanes];
  const int64_t parts = (s.side + kMostTaps - 1) / kMostTaps;
  for (int64_t row = 0; row < s.side; row += 2)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t column = s.side * part / parts, count = s.side * (part + 1) / parts - column;
      functions[count - 1](s, job.rows, job.columns, input + row * s.stage_row + column * kLanes, gradient, result);
      for (int64_t i = 0; i < std::min<int64_t>(2, s.side - row); ++i)
        std::copy_n(result + i * count * kLanes, count * kLanes, to + ((row + i) * s.side + column) * kLanes);
    }
}

void filter_gradient(const Sizes& s, const Tensor& x, const Tensor& gradient, Tensor& result) {
  const int64_t size = s.taps() * kLanes;
  std::vector<float> sums(s.jobs() * size);
  parallel_for(0, s.jobs(), 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t step = kColumns * kLanes;
    // (A row below, which the last odd row of taps reads)
    std::vector<float> staged(s.stage() + s.stage_row), gradients((kRows + 2) * step);
    for (int64_t index = begin; index < end; ++index) {
      const Job job(s, index);
      stage(s, job, x, s.margin, s.stage_row, staged.data());
      stage(s, job, gradient, 0, step, gradients.data() + step);
      correlate_tile(s, job, staged.data(), gradients.data(), sums.data() + index * size);
    }
  });
  float* const to = result.data();
  for (int64_t index = 0; index < s.jobs(); ++index) {
    const Job job(s, index);
    for (int64_t tap = 0; tap < s.taps(); ++tap)
      for (int64_t lane = 0; lane < job.lanes; ++lane)
        to[(job.image * s.channels + job.block * kLanes + lane) * s.taps() + tap] +=
            sums[index * size + tap * kLanes + lane];
  }
}

void check(const Tensor& x, const Tensor& kernel) {
  for (const Tensor& tensor : {x, kernel})
    require(tensor.dim() == 4 && tensor.is_float(),
            "depthwise_per_image takes float32 tensors of four dimensions on the CPU.");
  require(kernel.size(0) == x.size(0) && kernel.size(1) == x.size(1) && kernel.size(2) == kernel.size(3) &&
              kernel.size(2) % 2 == 1,
          "depthwise_per_image: a kernel of shape ", kernel.sizes(), " does not fit x of shape ", x.sizes(), ".");
}

Tensor depthwise_per_image(const Tensor& x, const Tensor& kernel) {
  check(x, kernel);
  Tensor out = empty_map(x.sizes());
  if (out.numel() == 0) return out;
  const Sizes s(x, kernel);
  filter(s, channels_innermost(x), arranged(s, kernel, false), out);
  return out;
}

std::tuple<Tensor, Tensor> depthwise_per_image_backward(const Tensor& gradient, const Tensor& x,
                                                        const Tensor& kernel, bool of_x, bool of_kernel) {
  check(x, kernel);
  check(gradient, kernel);
  require(gradient.sizes() == x.sizes(), "depthwise_per_image_backward: the gradient does not fit x.");
  Tensor x_gradient = of_x ? empty_channels_last(x.sizes()) : empty({0});
  Tensor kernel_gradient = zeros(of_kernel ? kernel.sizes() : Dimensions{0});
  if (x.numel() == 0) return {x_gradient, kernel_gradient};
  const Sizes s(x, kernel);
  const Tensor innermost = channels_innermost(gradient);
  if (of_x) filter(s, innermost, arranged(s, kernel, true), x_gradient);
  if (of_kernel) filter_gradient(s, channels_innermost(x), innermost, kernel_gradient);
  return {x_gradient, kernel_gradient};
}

}  // namespace
}  // namespace esc_arch

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def("depthwise_per_image_cpu(Tensor x, Tensor kernel) -> Tensor");
  m.def(
      "depthwise_per_image_backward_cpu(Tensor gradient, Tensor x, Tensor kernel, bool of_x, bool of_kernel) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("depthwise_per_image_cpu", ESC_ARCH_KERNEL(esc_arch::depthwise_per_image));
  m.impl("depthwise_per_image_backward_cpu", ESC_ARCH_KERNEL(esc_arch::depthwise_per_image_backward));
}
