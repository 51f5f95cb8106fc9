// 3 x 3 convolution of a channels_last map by Winograd's F(4 x 4, 3 x 3), with the layer normalisation before it and
// the addition after it: residual + conv(norm(x)), zero padding, stride 1.
//
// A tile of 4 x 4 outputs depends on 6 x 6 inputs. Polynomials in two variables, of the inputs and of the kernel, are
// evaluated at 6 x 6 points, multiplied there (a matrix product over the channels each) and interpolated: 36 products
// take the place of 144. Of the points whose powers are exact in float32, 0, +-11/16, +-3/2 and infinity lose the least
// to rounding: 1.8 times the error of a direct sum, where the textbook's 0, +-1, +-2 and infinity have 4 times.
//
// Rows are normalised and evaluated along the columns as they come; a thread walks down a band of tiles. For one point
// along the columns after another, the 6 points along the rows are evaluated, multiplied and interpolated back.

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "memory.h"
#include "pixels.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

constexpr int64_t kSide = 4;                  // outputs of a tile along a side
constexpr int64_t kPoints = 6;                // inputs and points along a side
constexpr int64_t kMargin = kPoints - kSide;  // inputs that two tiles share
constexpr int64_t kTilesAtOnce = 18;          // at most; a multiple of the rows of the products' register tiles
constexpr int64_t kCacheBudget = 768 * 1024;  // bytes of a thread's buffers at most, for they share L2 with the kernel
constexpr int64_t kPiece = 4;                 // tiles whose columns are normalised at once, so that they stay in L1

// --- the transforms -------------------------------------------------------------------------------------------------

constexpr double kA = 11.0 / 16, kB = 3.0 / 2, kAA = kA * kA, kBB = kB * kB;

ESC_ARCH_INLINE Vec times(double factor, Vec value) {
  return broadcast(static_cast<float>(factor)) * value;
}

// Six inputs to their polynomial's values at 0, A, -A, B, -B and infinity, as interpolation weighs them.
ESC_ARCH_INLINE void evaluate(const Vec (&d)[kPoints], Vec (&at)[kPoints]) {
  const Vec even_a = d[4] - times(kBB, d[2]), odd_a = d[3] - times(kBB, d[1]);
  const Vec even_b = d[4] - times(kAA, d[2]), odd_b = d[3] - times(kAA, d[1]);
  at[0] = d[4] - times(kAA + kBB, d[2]) + times(kAA * kBB, d[0]);
  at[1] = even_a + times(kA, odd_a);
  at[2] = even_a - times(kA, odd_a);
  at[3] = even_b + times(kB, odd_b);
  at[4] = even_b - times(kB, odd_b);
  at[5] = d[5] - times(kAA + kBB, d[3]) + times(kAA * kBB, d[1]);
}

// Products at the points to the four outputs.
ESC_ARCH_INLINE void interpolate(const Vec (&at)[kPoints], Vec (&y)[kSide]) {
  const Vec sum_a = at[1] + at[2], difference_a = at[1] - at[2];
  const Vec sum_b = at[3] + at[4], difference_b = at[3] - at[4];
  y[0] = at[0] + sum_a + sum_b;
  y[1] = times(kA, difference_a) + times(kB, difference_b);
  y[2] = times(kAA, sum_a) + times(kBB, sum_b);
  y[3] = at[5] + times(kAA * kA, difference_a) + times(kBB * kB, difference_b);
}

typedef double DoubleVec __attribute__((vector_size(2 * ESC_ARCH_VECTOR_BYTES)));

// The kernel's three numbers along a side to the points.
ESC_ARCH_INLINE void evaluate_kernel(const DoubleVec (&g)[3], DoubleVec (&at)[kPoints]) {
  constexpr double of_a = 1 / (2 * kAA * (kAA - kBB)), of_b = 1 / (2 * kBB * (kBB - kAA));
  const DoubleVec even_a = of_a * g[0] + (of_a * kAA) * g[2], odd_a = (of_a * kA) * g[1];
  const DoubleVec even_b = of_b * g[0] + (of_b * kBB) * g[2], odd_b = (of_b * kB) * g[1];
  at[0] = g[0] * (1 / (kAA * kBB));
  at[1] = even_a + odd_a;
  at[2] = even_a - odd_a;
  at[3] = even_b + odd_b;
  at[4] = even_b - odd_b;
  at[5] = g[2];
}

// --- sizes, weights and who does what -------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, height, width, inputs, outputs;
  int64_t padded_inputs, padded_outputs, tile_rows, tile_columns, tiles_at_once;

  Sizes(const Tensor& x, const Tensor& weight)
      : batch(x.size(0)), height(x.size(2)), width(x.size(3)), inputs(x.size(1)), outputs(weight.size(0)),
        padded_inputs(padded(inputs)), padded_outputs(padded(outputs)), tile_rows((height + kSide - 1) / kSide),
        tile_columns((width + kSide - 1) / kSide) {
    const int64_t size_of_a_tile = kPoints * ((kPoints + 1) * padded_inputs + (kSide + 1) * padded_outputs);
    const int64_t fitting = kCacheBudget / (size_of_a_tile * static_cast<int64_t>(sizeof(float)));
    tiles_at_once = std::clamp<int64_t>(fitting / 6 * 6, 6, kTilesAtOnce);
  }

  int64_t tiles() const {
    return batch * tile_rows * tile_columns;
  }
};

// The kernel at all points, by point along the columns, along the rows, input channel and output channel.
Tensor evaluated_kernel(const Sizes& s, const Tensor& weight) {
  const int64_t plane = s.inputs * s.padded_outputs;
  Floats taps(9 * plane, 0.0f);  // by row, column, input channel and output channel
  for (int64_t tap = 0; tap < 9; ++tap)
    for (int64_t i = 0; i < s.inputs; ++i) {
      const int64_t row = tap / 3 * weight.stride(2), column = tap % 3 * weight.stride(3);
      const float* given = weight.data() + i * weight.stride(1) + row + column;
      float* of_input = taps.data() + tap * plane + i * s.padded_outputs;
      for (int64_t o = 0; o < s.outputs; ++o) of_input[o] = given[o * weight.stride(0)];
    }
  Tensor kernel = empty({kPoints, kPoints, s.inputs, s.padded_outputs});
  const float* from = taps.data();
  float* to = kernel.data();
  parallel_for(0, plane / kLanes, 128, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin * kLanes; place < end * kLanes; place += kLanes) {
      DoubleVec along_columns[kPoints][3];
      for (int64_t row = 0; row < 3; ++row) {
        DoubleVec g[3], at[kPoints];
        for (int64_t column = 0; column < 3; ++column) {
          g[column] = __builtin_convertvector(load(from + (row * 3 + column) * plane + place), DoubleVec);
        }
        evaluate_kernel(g, at);
        for (int64_t point = 0; point < kPoints; ++point) along_columns[point][row] = at[point];
      }
      for (int64_t column = 0; column < kPoints; ++column) {
        DoubleVec at[kPoints];
        evaluate_kernel(along_columns[column], at);
        for (int64_t row = 0; row < kPoints; ++row) {
          store(to + (column * kPoints + row) * plane + place, __builtin_convertvector(at[row], Vec));
        }
      }
    }
  });
  return kernel;
}

// Tiles that one thread takes without a break: rows of a band, which begins at `left` and is `wide` tiles wide.
struct Segment {
  int64_t image, left, wide, top, bottom;
};

// Cut the tiles of all bands and images into `parts` equal parts, and call work(segment) for those of `part`.
template <typename Work>
void for_segments(const Sizes& s, int64_t part, int64_t parts, Work work) {
  const int64_t begin = s.tiles() * part / parts, end = s.tiles() * (part + 1) / parts;
  int64_t strip_begin = 0;
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t left = 0; left < s.tile_columns; left += s.tiles_at_once) {
      const int64_t wide = std::min(s.tiles_at_once, s.tile_columns - left);
      const auto row = [&](int64_t tile) { return std::clamp<int64_t>((tile - strip_begin) / wide, 0, s.tile_rows); };
      if (row(begin) < row(end)) work(Segment{image, left, wide, row(begin), row(end)});
      strip_begin += wide * s.tile_rows;
    }
  }
}

// use(first vector, how many) for the groups of vectors of output channels that the register tiles take.
template <typename Use>
ESC_ARCH_INLINE void for_groups(int64_t vectors, Use use) {
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    const int64_t n = left % kTileColumns == 0 ? kTileColumns : std::min(left, std::max<int64_t>(kTileColumns - 1, 2));
    use(v, n);
    v += n;
  }
}

struct Step {
  Sizes s;
  const float *x, *norm_weight, *norm_bias, *kernel, *bias, *residual;  // null where there is none
  float eps;
  float* y;
};

// --- one thread's work ----------------------------------------------------------------------------------------------

struct Buffers {
  Tensor memory;
  float *row;       // a piece of the map, normalised, zeros beyond the map
  float *along;     // rolling rows evaluated along the columns: by row, point along the columns, tile, channel
  float *points;    // by point along the rows, tile, input channel
  float *products;  // by point along the rows, tile, output channel
  float *halves;    // by point along the columns, output row, tile, output channel

  explicit Buffers(const Sizes& s) {
    const int64_t tiles = s.tiles_at_once;
    const int64_t of_row = (kSide * kPiece + kMargin) * s.padded_inputs;
    const int64_t of_along = kPoints * kPoints * tiles * s.padded_inputs;
    const int64_t of_points = kPoints * tiles * s.padded_inputs, of_products = kPoints * tiles * s.padded_outputs;
    memory = empty({of_row + of_along + of_points + of_products * (1 + kSide)});
    row = memory.data();
    along = row + of_row;
    points = along + of_along;
    products = points + of_points;
    halves = products + of_products;
  }
};

// The tiles of a segment that are done together: as many rows of them as make up for a narrow band.
struct Block {
  int64_t wide, most_rows, slots;

  Block(const Sizes& s, const Segment& segment)
      : wide(segment.wide), most_rows(std::max<int64_t>(s.tiles_at_once / wide, 1)),
        slots(kSide * most_rows + kMargin) {}
};

// Columns `from` to `until` of a row of the map, normalised, zeros beyond the map.
void normalise_columns(const Step& step, int64_t image, int64_t row, int64_t from, int64_t until, float* to) {
  const Sizes& s = step.s;
  const int64_t size = s.padded_inputs, begin = std::clamp<int64_t>(from, 0, s.width);
  const int64_t end = std::clamp(until, begin, s.width);
  std::fill(to, to + (begin - from) * size, 0.0f);
  std::fill(to + (end - from) * size, to + (until - from) * size, 0.0f);
  to += (begin - from) * size;
  const float* x = step.x + ((image * s.height + row) * s.width + begin) * s.inputs;
  if (step.norm_weight) {
    normalise(end - begin, s.inputs, x, step.norm_weight, step.norm_bias, step.eps,
              [=](int64_t p, int64_t c, int64_t, Vec value) { store(to + p * size + c, value); });
  } else {
    const Pixel pixel(s.inputs);
    for (int64_t p = 0; p < end - begin; ++p) {
      pixel.each([&](int64_t c, int64_t n) { store(to + p * size + c, load_count(x + p * s.inputs + c, n)); });
    }
  }
}

void evaluate_row(const Step& step, const Segment& part, int64_t row, const Buffers& buffers, float* to) {
  const Sizes& s = step.s;
  const int64_t size = s.padded_inputs, plane = part.wide * size;
  if (row < 0 || row >= s.height) {
    std::fill_n(to, kPoints * plane, 0.0f);
    return;
  }
  const auto column = [&](int64_t tile) { return kSide * (part.left + tile) - 1; };
  normalise_columns(step, part.image, row, column(0), column(0) + kMargin, buffers.row);
  for (int64_t piece = 0; piece < part.wide; piece += kPiece) {
    const int64_t tiles = std::min(kPiece, part.wide - piece);
    normalise_columns(step, part.image, row, column(piece) + kMargin, column(piece + tiles) + kMargin,
                      buffers.row + kMargin * size);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* from = buffers.row + kSide * tile * size;
      float* target = to + (piece + tile) * size;
      for (int64_t c = 0; c < size; c += kLanes) {
        Vec d[kPoints], at[kPoints];
#pragma GCC unroll 6
        for (int64_t i = 0; i < kPoints; ++i) d[i] = load(from + i * size + c);
        evaluate(d, at);
#pragma GCC unroll 6
        for (int64_t i = 0; i < kPoints; ++i) store(target + i * plane + c, at[i]);
      }
    }
    std::copy_n(buffers.row + kSide * tiles * size, kMargin * size, buffers.row);
  }
}

// As the register tile of products.h; as it goes it fetches a column of the matrix that comes next into L1.
template <int64_t M, int64_t N>
__attribute__((noinline)) void tile_and_fetch(int64_t depth, const float* a, int64_t a_row, const float* b,
                                              int64_t b_row, const float* next, float* result) {
  Vec sums[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(next + k * b_row);
    Vec columns[N];
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) columns[n] = load(b + k * b_row + n * kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; ++m) {
      const Vec factor = broadcast(a[m * a_row + k]);
#pragma GCC unroll 16
      for (int64_t n = 0; n < N; ++n) sums[m][n] += factor * columns[n];
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) store(result + (m * N + n) * kLanes, sums[m][n]);
  }
}

using FetchingTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, const float*, float*);

template <int64_t N, size_t... M>
constexpr std::array<FetchingTile, 9> fetching_tiles_of(std::index_sequence<M...>) {
  return {nullptr, &tile_and_fetch<static_cast<int64_t>(M) + 1, N>...};
}

template <size_t... N>
constexpr std::array<std::array<FetchingTile, 9>, 6> all_fetching_tiles(std::index_sequence<N...>) {
  return {std::array<FetchingTile, 9>{},
          fetching_tiles_of<static_cast<int64_t>(N) + 1>(std::make_index_sequence<kTileRows[N + 1]>())...};
}

constexpr auto kFetchingTiles = all_fetching_tiles(std::make_index_sequence<kTileColumns>());

// The products of all channels at one point. Groups of columns follow each other: see `for_groups`.
void multiply_point(const Sizes& s, int64_t tiles, const float* points, const float* kernel, const float* next,
                    float* to) {
  for_groups(s.padded_outputs / kLanes, [&](int64_t v, int64_t n) {
    float* group = to + tiles * v * kLanes;
    for (int64_t first = 0, fetched = 0; first < tiles; ++fetched) {
      const int64_t m = std::min(tiles - first, kTileRows[n]);
      const float* fetch = next + (v + std::min(fetched, n - 1)) * kLanes;
      kFetchingTiles[n][m](s.inputs, points + first * s.padded_inputs, s.padded_inputs, kernel + v * kLanes,
                           s.padded_outputs, fetch, group + first * n * kLanes);
      first += m;
    }
  });
}

// At one point along the columns: evaluate along the rows, multiply, and interpolate along the rows.
void multiply(const Step& step, const Block& block, int64_t first, int64_t rows, int64_t point,
              const Buffers& buffers) {
  const Sizes& s = step.s;
  const int64_t in_plane = block.wide * s.padded_inputs, out_plane = rows * block.wide * s.padded_outputs;
  for (int64_t tile_row = 0; tile_row < rows; ++tile_row) {
    const float* from[kPoints];
    for (int64_t i = 0; i < kPoints; ++i) {
      const int64_t slot = (kSide * (first + tile_row) + i) % block.slots;
      from[i] = buffers.along + (slot * kPoints + point) * in_plane;
    }
    float* to = buffers.points + tile_row * in_plane;
    for (int64_t place = 0; place < in_plane; place += kLanes) {
      Vec d[kPoints], at[kPoints];
#pragma GCC unroll 6
      for (int64_t i = 0; i < kPoints; ++i) d[i] = load(from[i] + place);
      evaluate(d, at);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kPoints; ++i) store(to + i * rows * in_plane + place, at[i]);
    }
  }
  const int64_t matrix = s.inputs * s.padded_outputs;
  for (int64_t i = 0; i < kPoints; ++i) {
    const int64_t index = point * kPoints + i, next = (index + 1) % (kPoints * kPoints);
    multiply_point(s, rows * block.wide, buffers.points + i * rows * in_plane, step.kernel + index * matrix,
                   step.kernel + next * matrix, buffers.products + i * out_plane);
  }
  float* to = buffers.halves + point * kSide * out_plane;
  for (int64_t place = 0; place < out_plane; place += kLanes) {
    Vec at[kPoints], y[kSide];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kPoints; ++i) at[i] = load(buffers.products + i * out_plane + place);
    interpolate(at, y);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSide; ++i) store(to + i * out_plane + place, y[i]);
  }
}

// Interpolate along the columns into the map.
void write_outputs(const Step& step, const Segment& part, int64_t first, int64_t rows, const Buffers& buffers) {
  const Sizes& s = step.s;
  const int64_t tiles = rows * part.wide, plane = tiles * s.padded_outputs;
  for (int64_t row = kSide * first; row < std::min(kSide * (first + rows), s.height); ++row) {
    const int64_t tile_row = row / kSide - first, within = row % kSide;
    for (int64_t tile = 0; tile < part.wide; ++tile) {
      const int64_t column = kSide * (part.left + tile), columns = std::min(kSide, s.width - column);
      const int64_t offset = ((part.image * s.height + row) * s.width + column) * s.outputs;
      for_groups(s.padded_outputs / kLanes, [&](int64_t v, int64_t n) {
        const float* halves =
            buffers.halves + within * plane + (tiles * v + (tile_row * part.wide + tile) * n) * kLanes;
        for (int64_t j = 0; j < n; ++j) {
          const int64_t c = (v + j) * kLanes, count = std::min(kLanes, s.outputs - c);
          const Vec bias = step.bias ? load_count(step.bias + c, count) : Vec{};
          Vec at[kPoints], y[kSide];
#pragma GCC unroll 6
          for (int64_t i = 0; i < kPoints; ++i) at[i] = load(halves + i * kSide * plane + j * kLanes);
          interpolate(at, y);
#pragma GCC unroll 4
          for (int64_t i = 0; i < kSide; ++i) {
            if (i >= columns) break;
            const int64_t place = offset + i * s.outputs + c;
            const Vec sum = y[i] + bias;
            store_count(step.y + place, step.residual ? sum + load_count(step.residual + place, count) : sum, count);
          }
        }
      });
    }
  }
}

void convolve_segment(const Step& step, const Segment& part, const Buffers& buffers) {
  const Block block(step.s, part);
  const int64_t size_of_row = kPoints * block.wide * step.s.padded_inputs;
  int64_t next = kSide * part.top - 1;
  for (int64_t first = part.top; first < part.bottom; first += block.most_rows) {
    const int64_t rows = std::min(block.most_rows, part.bottom - first);
    for (; next < kSide * (first + rows) + 1; ++next) {
      evaluate_row(step, part, next, buffers, buffers.along + (next + 1) % block.slots * size_of_row);
    }
    for (int64_t point = 0; point < kPoints; ++point) multiply(step, block, first, rows, point, buffers);
    write_outputs(step, part, first, rows, buffers);
  }
}

// --- the operator ---------------------------------------------------------------------------------------------------

using Optional = std::optional<Tensor>;

void check(const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, const Tensor& weight,
           const Optional& bias, const Optional& residual) {
  require(x.dim() == 4 && x.is_float(), "conv3x3 takes a float32 map (B, C, H, W) on the CPU");
  require(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3 &&
              (!bias || bias->numel() == weight.size(0)),
          "conv3x3's weight or bias does not fit the map");
  require(norm_weight.has_value() == norm_bias.has_value() &&
              (!norm_weight || (norm_weight->numel() == x.size(1) && norm_bias->numel() == x.size(1))),
          "conv3x3's normalisation does not fit the map");
  require(!residual || residual->sizes() == Dimensions{x.size(0), weight.size(0), x.size(2), x.size(3)},
          "conv3x3's residual has not the shape of the output");
}

Tensor conv3x3_fused(const Tensor& input, const Optional& norm_weight, const Optional& norm_bias, double eps,
                     const Tensor& weight, const Optional& bias, const Optional& residual) {
  check(input, norm_weight, norm_bias, weight, bias, residual);
  const auto contiguous = [](const Optional& tensor) { return tensor ? tensor->contiguous() : Tensor(); };
  const auto data = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.data() : nullptr;
  };
  const Tensor x = input.channels_last();
  const Tensor added = residual ? residual->channels_last() : Tensor();
  const Tensor scale = contiguous(norm_weight), shift = contiguous(norm_bias), offset = contiguous(bias);
  Tensor y = empty_map({x.size(0), weight.size(0), x.size(2), x.size(3)});
  if (y.numel() == 0) return y;
  const Sizes s(x, weight);
  const Tensor kernel = evaluated_kernel(s, weight);
  const Step step{s,           data(x), data(scale), data(shift), data(kernel), data(offset),
                  data(added), static_cast<float>(eps), y.data()};
  const int64_t parts = std::clamp<int64_t>(s.tiles() / kTilesAtOnce, 1, get_num_threads());
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Buffers buffers(s);
    for (int64_t part = begin; part < end; ++part) {
      for_segments(s, part, parts, [&](const Segment& segment) { convolve_segment(step, segment, buffers); });
    }
  });
  return y;
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const Optional& bias) {
  return conv3x3_fused(x, {}, {}, 0, weight, bias, {});
}

}  // namespace
}  // namespace esc_arch

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def(
      "conv3x3_fused_cpu(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, "
      "Tensor? residual) -> Tensor");
  m.def("conv3x3_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("conv3x3_fused_cpu", ESC_ARCH_KERNEL(esc_arch::conv3x3_fused));
  m.impl("conv3x3_cpu", ESC_ARCH_KERNEL(esc_arch::conv3x3));
}
