// Matrix products whose sums stay in registers, with whatever is to be done to each result done at once.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "vectors.h"

namespace esc_arch {

struct Strided {
  const float* data;
  int64_t row, step;

  ESC_ARCH_INLINE Strided from_row(int64_t r) const {
    return {data + r * row, row, step};
  }
};

// The columns of a tile are kept in registers together with its sums, so fewer rows fit beside more columns.
constexpr int64_t kTileRows[] = {0, 8, kTileColumns == 2 ? 6 : 8, 8, 6, 5};

// M x (N vectors) sums of products, kept in registers until take(m, n, sums) has each. A function of its own: inlined,
// the sums would be spilled. Its arguments are numbers, not a Strided: copying one waits for earlier stores to finish.
template <int64_t M, int64_t N, typename Take>
__attribute__((noinline)) void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                    int64_t b_step, const float* bias, const Take& take) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) sums[m][n] = bias ? load(bias + n * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[N];
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) columns[n] = load(b + k * b_step + n * kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; ++m) {
      const Vec factor = broadcast(a[m * a_row + k * a_step]);
#pragma GCC unroll 16
      for (int64_t n = 0; n < N; ++n) sums[m][n] += factor * columns[n];
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) take(m, n, sums[m][n]);
  }
}

// Keeps the sums of a tile at the edge, so that what is done to them need not be compiled for every size of tile.
struct Kept {
  float* result;
  int64_t columns;

  ESC_ARCH_INLINE void operator()(int64_t m, int64_t n, Vec sum) const {
    store(result + (m * columns + n) * kLanes, sum);
  }
};

using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, const float*, const Kept&);

template <int64_t N, size_t... M>
constexpr std::array<Tile, 9> tiles_of(std::index_sequence<M...>) {
  return {nullptr, &tile<static_cast<int64_t>(M) + 1, N, Kept>...};
}

// Of N vectors of columns, by rows.
template <int64_t N>
constexpr auto kTiles = tiles_of<N>(std::make_index_sequence<kTileRows[N] - 1>());

// The product for the N vectors of columns from `v` on.
template <int64_t N, typename Use>
ESC_ARCH_INLINE void strip_product(int64_t rows, int64_t v, int64_t depth, Strided a, const float* b, int64_t b_step,
                                   const float* bias, Use use) {
  constexpr int64_t M = kTileRows[N];
  const float *columns = b + v * kLanes, *start = bias ? bias + v * kLanes : nullptr;
  int64_t first = 0;
  for (; first + M <= rows; first += M) {
    const auto take = [=](int64_t m, int64_t n, Vec sum) ESC_ARCH_INLINE_LAMBDA { use(first + m, v + n, sum); };
    tile<M, N>(depth, a.data + first * a.row, a.row, a.step, columns, b_step, start, take);
  }
  if (first == rows) return;
  alignas(64) float result[M * N * kLanes];
  kTiles<N>[rows - first](depth, a.data + first * a.row, a.row, a.step, columns, b_step, start, Kept{result, N});
  for (int64_t m = 0; m < rows - first; ++m) {
    for (int64_t n = 0; n < N; ++n) use(first + m, v + n, load(result + (m * N + n) * kLanes));
  }
}

// a (rows, depth) times b (depth, vectors * kLanes), plus bias; use(row, vector, sums) takes each result once.
template <typename Use>
ESC_ARCH_INLINE void product(int64_t rows, int64_t vectors, int64_t depth, Strided a, const float* b, int64_t b_step,
                             const float* bias, Use use) {
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    const int64_t n = left % kTileColumns == 0 ? kTileColumns : std::min(left, std::max<int64_t>(kTileColumns - 1, 2));
    const auto strip = [&]<int64_t N>() {
      if constexpr (N <= kTileColumns) {
        if (n == N) strip_product<N>(rows, v, depth, a, b, b_step, bias, use);
      }
    };
    strip.template operator()<1>();
    strip.template operator()<2>();
    strip.template operator()<3>();
    strip.template operator()<4>();
    strip.template operator()<5>();
    v += n;
  }
}

// Write vector v of a pixel that has `channels` channels.
ESC_ARCH_INLINE void store_channels(float* pixel, int64_t v, int64_t channels, Vec value) {
  const int64_t left = channels - v * kLanes;
  if (left >= kLanes) {
    store(pixel + v * kLanes, value);
  } else {
    store_first(pixel + v * kLanes, value, left);
  }
}

}  // namespace esc_arch
