// Window attention on the CPU, forward and backward, float32: no window copies, no (tokens x tokens) tensor.
//
// Letters: B batch, C channels, H, W the map, h heads, d head dimension, w window side, N = w * w tokens,
// V floats of a vector, r rank of the bias factors.
//
// A task is one head of one window. A vector holds V queries next to each other in one row of the window, so the
// biases of these queries towards one key lie side by side in the table once its columns are reversed, and are read
// with one load. Two vectors of queries (a pair) meet a block of keys at a time; weights stay in the L1 cache. The
// softmax is the online one, in powers of 2; where scores are small for certain it is the plain one without a maximum,
// taken while the scores are in registers. Factors of the bias are further dimensions of q and k.
//
// Nothing depends on the number of threads: each task or chunk of tasks has its own place for results, and sums
// over those are made in a fixed order.


#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "memory.h"
#include "pixels.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace {

using namespace esc_arch;

constexpr int V = kLanes;

// Dimensions that are accumulated at a time in registers, and keys whose scores are: AVX2 has 16 of them, others 32
constexpr int DIMS = V == 8 ? 4 : 8;
constexpr int KEYS = V == 8 ? 4 : 8;
// Keys whose gradients are
constexpr int GRADIENTS = V == 8 ? 8 : 16;
constexpr int BLOCK = 64;
constexpr int PAIR = 2 * V;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
// Scores between -BOUND and BOUND, in powers of 2, need no maximum: the sum of their powers, the products with values
// and those of the backward stay far from the ends of float's range
constexpr float BOUND = 60;
#if defined(CPU_CAPABILITY_AVX512)
// Of 2^x on [0, 1]: minimax fit, relative error 9e-8
constexpr float POWER_OF_TWO[] = {0.99999994f, 0.69315308f, 0.24015361f, 0.055826318f, 0.0089893397f, 0.0018775767f};
#endif

// The compiler makes two instructions of `a > b ? a : b`, because of NaN
ESC_ARCH_INLINE Vec max(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for |x| < 126
ESC_ARCH_INLINE Vec power_of_two(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int toward_minus_infinity = 1;
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, toward_minus_infinity);
  return (Vec)_mm512_scalef_ps((__m512)polynomial(POWER_OF_TWO, fraction), (__m512)x);
#else
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits
  const Vec shifted = x + broadcast(12582912.0f);
  const Vec fraction = x - (shifted - broadcast(12582912.0f));
  return (Vec)((IntVec)polynomial(kExp2, fraction) + ((IntVec)shifted << 23));
#endif
}

// 2^x for x <= 0; powers too small for a normal number as the smallest, because denormal ones are slow. NaN stays NaN:
// the instruction returns its second argument then
ESC_ARCH_INLINE Vec weight_of(Vec x) {
  return power_of_two(max(broadcast(-125.0f), x));
}

// Room for floats on the boundary of a cache line, not initialised
class Floats {
 public:
  explicit Floats(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(64)))) {}

  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  float& operator[](int64_t i) { return data_.get()[i]; }

 private:
  struct Delete {
    void operator()(float* place) const { ::operator delete(place, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Delete> data_;
};

int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

int64_t reflected(int64_t index, int64_t size) {
  if (index < size) return index;
  const int64_t period = std::max<int64_t>(2 * size - 2, 1);
  index %= period;
  return std::min(index, period - index);
}

// NaN is the largest: the bits of |x|, as integers, are in the order of the numbers with NaN behind infinity
float largest_magnitude(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

// A (B, channels, H, W) tensor by its strides
struct Map {
  float* data;
  int64_t batch, channel, row, column;

  explicit Map(const Tensor& x)
      : data(x.data()), batch(x.stride(0)), channel(x.stride(1)), row(x.stride(2)), column(x.stride(3)) {}

  // (B, w, w) pixels of `pixel` floats
  Map(float* data, int64_t window, int64_t pixel)
      : data(data), batch(window * window * pixel), channel(1), row(window * pixel), column(pixel) {}

  Map from(int64_t first) const {
    Map later = *this;
    later.data += first * channel;
    return later;
  }

  float* at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return data + b * batch + c * channel + y * row + x * column;
  }
};

struct Shape {
  int64_t batch, heads, dim, rank, height, width, window;
  int64_t tokens, rows, columns, windows;  // of a window; of windows in the map; windows of the batch
  int64_t inner;                           // dimensions of q k^T: d, and the factors' rank
  int64_t stride, value_stride;            // between tokens in packed k (and q), and v
  int64_t vectors;                         // of queries in a row of a window
  int64_t side, table;                     // of the table: 2 w - 1, and its square
  float scale;

  Shape(const Tensor& qkv, int64_t rank, int64_t window, int64_t heads)
      : Shape(qkv.size(0), qkv.size(1) / 3, qkv.size(2), qkv.size(3), rank, window, heads) {}

  Shape(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t rank, int64_t window, int64_t heads)
      : batch(batch), heads(heads), dim(channels / heads), rank(rank), height(height), width(width), window(window),
        tokens(window * window), rows((height + window - 1) / window), columns((width + window - 1) / window),
        windows(batch * rows * columns), inner(dim + rank), stride(round_up(inner, std::max(V, DIMS))),
        value_stride(round_up(dim, std::max(V, DIMS))), vectors((window + V - 1) / V), side(2 * window - 1),
        table(side * side),
        scale(1.0f / std::sqrt(static_cast<float>(dim))) {}

  // Queries of a vector that begins at this column
  int64_t lanes(int64_t column) const { return std::min<int64_t>(V, window - column); }
};

// Where a window lies, and how much of it lies on the map
struct Window {
  int64_t b, top, left, height, width;

  Window(const Shape& s, int64_t index)
      : b(index / (s.rows * s.columns)), top(index / s.columns % s.rows * s.window),
        left(index % s.columns * s.window), height(std::min(s.window, s.height - top)),
        width(std::min(s.window, s.width - left)) {}

  bool whole(const Shape& s) const { return height == s.window && width == s.window; }
};

// Two vectors of queries; where their number is odd, the last has no second
struct Pair {
  int64_t row[2], column[2];
  int count;

  Pair(const Window& at, int64_t index) : count(0) {
    const int64_t per_row = (at.width + V - 1) / V;
    for (int64_t i = 2 * index; i < std::min(2 * index + 2, at.height * per_row); ++i, ++count) {
      row[count] = i / per_row;
      column[count] = i % per_row * V;
    }
    if (count == 1) row[1] = row[0], column[1] = column[0];
  }

  static int64_t number(const Window& at) { return (at.height * ((at.width + V - 1) / V) + 1) / 2; }
  int64_t token(const Shape& s, int j) const { return row[j] * s.window + column[j]; }
};

// The bias of every pair of tokens in one head: in powers of 2 the table (2w - 1, 2w - 1) with its columns reversed,
// and the largest magnitude of all heads; or factors (N, r), which are in powers of e still
struct Bias {
  const float *table, *query_factors, *key_factors;
  float largest;
  int64_t window, side;

  const float* row(const Pair& pair, int j, int64_t key_row) const {
    if (!table) return nullptr;
    return table + (key_row - pair.row[j] + window - 1) * side + pair.column[j] + window - 1;
  }
};

// The position bias of all heads: a table, or two factors
class Biases {
 public:
  Biases(const Tensor& bias, const std::optional<Tensor>& key_factors, const Shape& s)
      : shape_(s), table_(key_factors ? 0 : s.heads * s.table + 2 * V) {
    const float* data = bias.data();
    if (key_factors) {
      query_factors_ = data;
      key_factors_ = key_factors->data();
      return;
    }
    // (More floats, because the last lanes of a row that is no multiple of V read past it)
    std::memset(table_.data() + s.heads * s.table, 0, 2 * V * sizeof(float));
    for (int64_t row = 0; row < s.heads * s.side; ++row)
      for (int64_t i = 0; i < s.side; ++i)
        table_[row * s.side + i] = LOG2_E * data[row * s.side + s.side - 1 - i];
    largest_ = largest_magnitude(table_.data(), s.heads * s.table);
  }

  Bias of_head(int64_t head) const {
    const int64_t factors = head * shape_.tokens * shape_.rank;
    if (key_factors_) return {nullptr, query_factors_ + factors, key_factors_ + factors, 0, shape_.window, shape_.side};
    return {table_.data() + head * shape_.table, nullptr, nullptr, largest_, shape_.window, shape_.side};
  }

 private:
  const Shape& shape_;
  Floats table_;
  const float *query_factors_ = nullptr, *key_factors_ = nullptr;
  float largest_ = 0;
};

// A token's channels times a factor to one side of a copy; the other side has them next to each other
ESC_ARCH_INLINE void gather(const float* from, int64_t step, int64_t count, float factor, float* to) {
  int64_t c = 0;
  if (step == 1)
    for (; c + V <= count; c += V) store(to + c, broadcast(factor) * load(from + c));
  for (; c < count; ++c) to[c] = factor * from[c * step];
}

ESC_ARCH_INLINE void scatter(const float* from, int64_t count, float factor, float* to, int64_t step) {
  int64_t c = 0;
  if (step == 1)
    for (; c + V <= count; c += V) store(to + c, broadcast(factor) * load(from + c));
  for (; c < count; ++c) to[c * step] = factor * from[c];
}

// The head's channels of every token of a window, token after token, those outside the map by reflection
void pack_tokens(const Map& map, const Shape& s, const Window& at, int64_t channel, float* out, int64_t stride) {
  if (stride > s.dim) std::memset(out, 0, s.tokens * stride * sizeof(float));
  for (int64_t y = 0; y < s.window; ++y) {
    const int64_t source_row = reflected(at.top + y, s.height);
    for (int64_t x = 0; x < s.window; ++x) {
      const float* source = map.at(at.b, channel, source_row, reflected(at.left + x, s.width));
      gather(source, map.channel, s.dim, 1, out + (y * s.window + x) * stride);
    }
  }
}

// Factors (N, r) behind the d dimensions of every token
void pack_factors(const float* factors, const Shape& s, float* out) {
  for (int64_t token = 0; token < s.tokens; ++token)
    std::memcpy(out + token * s.stride + s.dim, factors + token * s.rank, s.rank * sizeof(float));
}

// A pair's queries of a map, one after the other: (2V, stride), zeros outside the map
void pack_pair(const Map& map, const Shape& s, const Window& at, const Pair& pair, int64_t channel, float factor,
               float* out, int64_t stride) {
  std::memset(out, 0, PAIR * stride * sizeof(float));
  for (int j = 0; j < pair.count; ++j)
    for (int64_t i = 0; i < std::min<int64_t>(V, at.width - pair.column[j]); ++i) {
      const float* source = map.at(at.b, channel, at.top + pair.row[j], at.left + pair.column[j] + i);
      gather(source, map.channel, s.dim, factor, out + (j * V + i) * stride);
    }
}

// q of a pair times the scale, and the queries' factors of the bias, so that scores are powers of 2
void pack_queries(const Map& qkv, const float* factors, const Shape& s, const Window& at, const Pair& pair,
                  int64_t head, float* out) {
  pack_pair(qkv, s, at, pair, head * s.dim, LOG2_E * s.scale, out, s.stride);
  if (!factors) return;
  for (int j = 0; j < pair.count; ++j)
    for (int64_t i = 0; i < s.lanes(pair.column[j]); ++i) {
      const float* source = factors + (pair.row[j] * s.window + pair.column[j] + i) * s.rank;
      for (int64_t r = 0; r < s.rank; ++r) out[(j * V + i) * s.stride + s.dim + r] = LOG2_E * source[r];
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ESC_ARCH_SHUFFLES
#endif
#endif

#if defined(ESC_ARCH_SHUFFLES)
// a0 b0 a1 b1 .. from element `First` on
template <int First, size_t... I>
ESC_ARCH_INLINE Vec riffle(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (First + static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * V)...);
}
#endif

// V rows of V floats times a factor, transposed
__attribute__((noinline)) void transpose_block(const float* in, int64_t in_step, float factor, float* out,
                                               int64_t out_step) {
#if defined(ESC_ARCH_SHUFFLES)
  constexpr std::make_index_sequence<V> all;
  Vec rows[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) rows[i] = broadcast(factor) * load(in + i * in_step);
  // Riffling the halves of the whole block rotates the bits of each element's place; half of all rotations transpose
#pragma GCC unroll 4
  for (int left = V; left > 1; left /= 2) {
    Vec riffled[V];
#pragma GCC unroll 16
    for (int i = 0; i < V / 2; ++i) {
      riffled[2 * i] = riffle<0>(rows[i], rows[i + V / 2], all);
      riffled[2 * i + 1] = riffle<V / 2>(rows[i], rows[i + V / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) rows[i] = riffled[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) store(out + i * out_step, rows[i]);
#else
  for (int i = 0; i < V; ++i)
    for (int c = 0; c < V; ++c) out[c * out_step + i] = factor * in[i * in_step + c];
#endif
}

// (2V, stride) to (dims, 2V)
void transpose_pair(const float* in, int64_t stride, int64_t dims, float* out) {
  const int64_t whole = dims / V * V;
  for (int64_t c = 0; c < whole; c += V)
    for (int j = 0; j < 2; ++j) transpose_block(in + j * V * stride + c, stride, 1, out + c * PAIR + j * V, PAIR);
  for (int64_t i = 0; i < PAIR; ++i)
    for (int64_t c = whole; c < dims; ++c) out[c * PAIR + i] = in[i * stride + c];
}

// What becomes of scores while they are in registers still: each is told the floats from its place on where one of a
// key belongs, 2V from key to key

// They are stored, and the largest found
struct Scores {
  float* out;
  Vec largest[2];

  ESC_ARCH_INLINE void operator()(int64_t place, int j, Vec score) {
    largest[j] = max(largest[j], score);
    store(out + place, score);
  }

  void advance(int64_t floats) { out += floats; }
};

// Weights relative to the maximum, which bounded scores do not need, are stored; their sum if it is wanted
template <bool Bounded, bool Sum>
struct Weights {
  float* out;
  Vec maximum[2], sum[2];

  ESC_ARCH_INLINE void operator()(int64_t place, int j, Vec score) {
    const Vec weight = Bounded ? power_of_two(score) : weight_of(score - maximum[j]);
    if (Sum) sum[j] += weight;
    store(out + place, weight);
  }

  void advance(int64_t floats) { out += floats; }
};

// The products are of the output's gradient with values: the scores' gradients are stored
struct ScoreGradients {
  const float* weights;
  float* out;
  Vec delta[2];

  ESC_ARCH_INLINE void operator()(int64_t place, int j, Vec product) {
    store(out + place, load(weights + place) * (product - delta[j]));
  }

  void advance(int64_t floats) { weights += floats, out += floats; }
};

// use(place, vector, scores) of bias + sum over c of q(c, 2V) k(key, c); D dims and D floats to the next key, 0 for any
template <int K, int D, typename Use>
ESC_ARCH_INLINE void products_of(const float* q, const float* k, int64_t dims, int64_t stride, const float* bias0,
                                 const float* bias1, int64_t first, Use& use) {
  if (D > 0) stride = D;  // known, so that one address reaches all keys
  Vec sum[K][2];
  for (int i = 0; i < K; ++i) {
    sum[i][0] = bias0 ? load(bias0 - i) : Vec{};
    sum[i][1] = bias0 ? load(bias1 - i) : Vec{};
  }
  const auto add = [&](int64_t c) {
    const Vec left = load(q + c * PAIR), right = load(q + c * PAIR + V);
    for (int i = 0; i < K; ++i) {
      const Vec key = broadcast(k[i * stride + c]);
      sum[i][0] += left * key;
      sum[i][1] += right * key;
    }
  };
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int c = 0; c < D; ++c) add(c);
  } else {
    for (int64_t c = 0; c < dims; ++c) add(c);
  }
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i)
    for (int j = 0; j < 2; ++j) use((first + i) * PAIR + j * V, j, sum[i][j]);
}

template <int D, typename Use>
__attribute__((noinline)) void products_in(const float* q, const float* k, int64_t keys, int64_t dims, int64_t stride,
                                           const float* bias0, const float* bias1, Use& given) {
  Use use = given;  // a copy, whose vectors can be registers
  int64_t i = 0;
  for (; i + KEYS <= keys; i += KEYS)
    products_of<KEYS, D>(q, k + i * stride, dims, stride, bias0 ? bias0 - i : nullptr, bias0 ? bias1 - i : nullptr, i,
                         use);
  for (; i < keys; ++i)
    products_of<1, 0>(q, k + i * stride, dims, stride, bias0 ? bias0 - i : nullptr, bias0 ? bias1 - i : nullptr, i,
                      use);
  use.advance(keys * PAIR);
  given = use;
}

// Products of a pair with some keys, which `use` takes and then stands behind
template <typename Use>
void products(const float* q, const float* k, int64_t keys, int64_t dims, int64_t stride, const float* bias0,
              const float* bias1, Use& use) {
  // The head dimension of all published networks is worth a loop of its own
  const auto run = dims == 16 && stride == 16 ? products_in<16, Use> : products_in<0, Use>;
  run(q, k, keys, dims, stride, bias0, bias1, use);
}

// Scores of a pair towards whole rows of keys
template <typename Use>
void scores(const float* q, const float* k, const Shape& s, const Bias& bias, const Pair& pair, int64_t first_row,
            int64_t rows, Use& use) {
  for (int64_t y = first_row; y < first_row + rows; ++y)
    products(q, k + y * s.window * s.stride, s.window, s.inner, s.stride, bias.row(pair, 0, y), bias.row(pair, 1, y),
             use);
}

// The largest magnitude of each dimension of the keys; out is as long as a token
void bound_keys(const float* k, const Shape& s, float* out) {
  for (int64_t c = 0; c < s.stride; c += V) {
    IntVec largest = {};
    for (int64_t token = 0; token < s.tokens; ++token) {
      const IntVec magnitude = (IntVec)load(k + token * s.stride + c) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    store(out + c, (Vec)largest);
  }
}

// Whether all scores of a pair lie between -BOUND and BOUND for certain; not where a number is none
bool bounded(const float* q, const float* key_bounds, const Shape& s, const Bias& bias) {
  Vec sum[2] = {broadcast(bias.largest), broadcast(bias.largest)};
  for (int64_t c = 0; c < s.inner; ++c)
    for (int j = 0; j < 2; ++j)
      sum[j] += (Vec)((IntVec)load(q + c * PAIR + j * V) & 0x7fffffff) * broadcast(key_bounds[c]);
  float sums[PAIR];
  for (int j = 0; j < 2; ++j) store(sums + j * V, sum[j]);
  return largest_magnitude(sums, PAIR) <= BOUND;
}

// out(c, 2V) = out(c, 2V) shrink(2V) + sum over keys of p(key, 2V) m(key, c), c < dims rounded up to DIMS
//
// (What the block adds is summed by itself: that is more accurate than one sum over all keys)
void accumulate_queries(const float* p, const float* m, int64_t keys, int64_t dims, int64_t stride, const Vec* shrink,
                        float* out) {
  for (int64_t first = 0; first < dims; first += DIMS) {
    Vec sum[DIMS][2] = {};
    for (int64_t i = 0; i < keys; ++i) {
      const Vec left = load(p + i * PAIR), right = load(p + i * PAIR + V);
      for (int c = 0; c < DIMS; ++c) {
        const Vec factor = broadcast(m[i * stride + first + c]);
        sum[c][0] += left * factor;
        sum[c][1] += right * factor;
      }
    }
    for (int c = 0; c < DIMS; ++c)
      for (int j = 0; j < 2; ++j) {
        float* place = out + (first + c) * PAIR + j * V;
        store(place, load(place) * shrink[j] + sum[c][j]);
      }
  }
}

// out(key, stride) += sum over the pair's queries of p(key, query) rows(query, stride); keys a multiple of GRADIENTS
void accumulate_keys(const float* p, const float* rows, int64_t keys, int64_t dims, int64_t stride, float* out) {
  for (int64_t first = 0; first < keys; first += GRADIENTS)
    for (int64_t c = 0; c < dims; c += V) {
      Vec sum[GRADIENTS];
#pragma GCC unroll 16
      for (int i = 0; i < GRADIENTS; ++i) sum[i] = load(out + (first + i) * stride + c);
      const float *weights = p + first * PAIR, *row = rows + c;
#pragma GCC unroll 4
      for (int query = 0; query < PAIR; ++query, row += stride) {
        const Vec value = load(row);
#pragma GCC unroll 16
        for (int i = 0; i < GRADIENTS; ++i) sum[i] += broadcast(weights[i * PAIR + query]) * value;
      }
#pragma GCC unroll 16
      for (int i = 0; i < GRADIENTS; ++i) store(out + (first + i) * stride + c, sum[i]);
    }
}

// Rows of keys that are worked on at a time
int64_t rows_of_block(const Shape& s) {
  return std::max<int64_t>(1, std::min<int64_t>(s.window, BLOCK / s.window));
}

int64_t room_of_block(const Shape& s) {
  return (rows_of_block(s) * s.window + GRADIENTS) * PAIR;
}

// Runs work(task, its own scratch) for all tasks, handed out one by one because some threads are slower
template <typename Make, typename Work>
void for_each_task(int64_t tasks, const Make& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(get_num_threads(), tasks);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    auto scratch = make_scratch();
    for (int64_t task = next++; task < tasks; task = next++) work(task, scratch);
  });
}

// What the softmax of each of a window's queries was divided by: 2^maximum / inverse_sum. (Their logarithm would be
// rounded to its own size.)
struct Statistics {
  float *maximum = nullptr, *inverse_sum = nullptr;

  Statistics() = default;

  // Of one head of one window, in a tensor (2, h, windows, N)
  Statistics(float* all, const Shape& s, int64_t task)
      : maximum(all + task * s.tokens), inverse_sum(maximum + s.heads * s.windows * s.tokens) {}
};

// --- forward -------------------------------------------------------------------------------------------------------

struct ForwardScratch {
  Floats k, v, key_bounds, rows, q, p, out;
  const float *keys = nullptr, *values = nullptr;  // packed, here or where they were found so

  explicit ForwardScratch(const Shape& s)
      : k(s.tokens * s.stride), v(s.tokens * s.value_stride), key_bounds(s.stride), rows(PAIR * s.stride),
        q(PAIR * s.inner), p(room_of_block(s)), out(PAIR * s.value_stride) {}
};

// Scores (keys, 2V) to weights relative to the maximum, and their sum
void weigh(float* p, int64_t keys, const Vec* maximum, Vec* sum) {
  Weights<false, true> weights{p, {maximum[0], maximum[1]}, {}};
  for (int64_t i = 0; i < keys; ++i)
    for (int j = 0; j < 2; ++j) weights(i * PAIR + j * V, j, load(p + i * PAIR + j * V));
  for (int j = 0; j < 2; ++j) sum[j] = weights.sum[j];
}

// The online softmax of a pair over all keys: out(d, 2V), and its maximum and sum
template <bool Bounded>
void attend(const Shape& s, const Bias& bias, const Pair& pair, ForwardScratch& scratch, Vec* maximum, Vec* sum) {
  std::memset(scratch.out.data(), 0, PAIR * s.value_stride * sizeof(float));
  const int64_t step = rows_of_block(s);
  for (int j = 0; j < 2; ++j) maximum[j] = broadcast(Bounded ? 0.0f : -FLT_MAX), sum[j] = Vec{};
  for (int64_t first = 0; first < s.window; first += step) {
    const int64_t rows = std::min(step, s.window - first), keys = rows * s.window;
    const float *q = scratch.q.data(), *k = scratch.keys;
    float* p = scratch.p.data();
    Vec shrink[2] = {broadcast(1), broadcast(1)};
    if constexpr (Bounded) {
      Weights<true, true> weights{p, {}, {}};
      scores(q, k, s, bias, pair, first, rows, weights);
      for (int j = 0; j < 2; ++j) sum[j] += weights.sum[j];
    } else {
      Scores found{p, {maximum[0], maximum[1]}};
      scores(q, k, s, bias, pair, first, rows, found);
      Vec block[2];
      weigh(p, keys, found.largest, block);
      for (int j = 0; j < 2; ++j) {
        shrink[j] = weight_of(maximum[j] - found.largest[j]);
        maximum[j] = found.largest[j];
        sum[j] = sum[j] * shrink[j] + block[j];
      }
    }
    accumulate_queries(p, scratch.values + first * s.window * s.value_stride, keys, s.dim, s.value_stride, shrink,
                       scratch.out.data());
  }
}

// A pair's output (d, 2V), and for the backward the statistics, unless there is no place for them
void attend_pair(const Shape& s, const Bias& bias, const Pair& pair, ForwardScratch& scratch,
                 const Statistics& statistics) {
  Vec maximum[2], sum[2];
  const bool easy = bounded(scratch.q.data(), scratch.key_bounds.data(), s, bias);
  (easy ? attend<true> : attend<false>)(s, bias, pair, scratch, maximum, sum);
  for (int j = 0; j < 2; ++j) {
    const Vec inverse = 1.0f / sum[j];
    for (int64_t c = 0; c < s.dim; ++c) {
      float* place = scratch.out.data() + c * PAIR + j * V;
      store(place, load(place) * inverse);
    }
    if (statistics.maximum && j < pair.count) {
      store_first(statistics.maximum + pair.token(s, j), maximum[j], s.lanes(pair.column[j]));
      store_first(statistics.inverse_sum + pair.token(s, j), inverse, s.lanes(pair.column[j]));
    }
  }
}

// (d, 2V) to the channels of a map, without what lies outside
void unpack_pair(const float* in, const Shape& s, const Window& at, const Pair& pair, int64_t channel, float factor,
                 const Map& out) {
  for (int j = 0; j < pair.count; ++j) {
    const int64_t lanes = std::min<int64_t>(V, at.width - pair.column[j]);
    const int64_t whole = lanes == V && out.channel == 1 ? s.dim / V * V : 0;
    float* first = out.at(at.b, channel, at.top + pair.row[j], at.left + pair.column[j]);
    for (int64_t c = 0; c < whole; c += V)
      transpose_block(in + c * PAIR + j * V, PAIR, factor, first + c, out.column);
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t c = whole; c < s.dim; ++c)
        first[i * out.column + c * out.channel] = factor * in[c * PAIR + j * V + i];
  }
}

struct Range {
  int64_t begin, end;
};

// The queries, keys and values of one head, each from its first channel on
struct Head {
  int64_t index;
  Map q, k, v;

  // Of a map of 3 h d channels
  Head(const Shape& s, const Map& qkv, int64_t index)
      : index(index), q(qkv.from(index * s.dim)), k(qkv.from((s.heads + index) * s.dim)),
        v(qkv.from((2 * s.heads + index) * s.dim)) {}

  Head(int64_t index, const Map& q, const Map& k, const Map& v) : index(index), q(q), k(k), v(v) {}
};

// The tokens of a window, packed unless they are already
const float* packed_tokens(const Map& map, const Shape& s, const Window& at, float* room, int64_t stride) {
  if (map.channel == 1 && map.column == stride && stride == s.dim && map.row == s.window * stride)
    return map.at(at.b, 0, at.top, at.left);
  pack_tokens(map, s, at, 0, room, stride);
  return room;
}

// Some pairs of queries of one head in one window
void attend_window(const Shape& s, const Bias& bias, const Head& head, const Window& at, Range pairs,
                   ForwardScratch& scratch, const Statistics& statistics, const Map& out) {
  scratch.keys = packed_tokens(head.k, s, at, scratch.k.data(), s.stride);
  scratch.values = packed_tokens(head.v, s, at, scratch.v.data(), s.value_stride);
  if (bias.key_factors) pack_factors(bias.key_factors, s, scratch.k.data());
  bound_keys(scratch.keys, s, scratch.key_bounds.data());
  for (int64_t i = pairs.begin; i < pairs.end; ++i) {
    const Pair pair(at, i);
    pack_queries(head.q, bias.query_factors, s, at, pair, 0, scratch.rows.data());
    transpose_pair(scratch.rows.data(), s.stride, s.inner, scratch.q.data());
    attend_pair(s, bias, pair, scratch, statistics);
    unpack_pair(scratch.out.data(), s, at, pair, head.index * s.dim, 1.0f, out);
  }
}

void check_bias(const Tensor& bias, const std::optional<Tensor>& key_factors, int64_t window, int64_t heads) {
  require(bias.is_float() && bias.is_contiguous(),
          "esc_arch::window_attention_cpu: the bias must be float32 and contiguous.");
  if (!key_factors) {
    require(bias.dim() == 2 && bias.size(0) == heads && bias.size(1) == (2 * window - 1) * (2 * window - 1),
            "esc_arch::window_attention_cpu: the bias table must be (heads, (2 window - 1)^2).");
    return;
  }
  require(key_factors->is_float() && key_factors->is_contiguous() && bias.dim() == 3 &&
              bias.sizes() == key_factors->sizes() && bias.size(0) == heads && bias.size(1) == window * window,
          "esc_arch::window_attention_cpu: both factors of the bias must be contiguous, (heads, window^2, rank).");
}

void check(const Tensor& qkv, const Tensor& bias, const std::optional<Tensor>& key_factors,
           int64_t window, int64_t heads) {
  require(window >= 1 && heads >= 1 && qkv.dim() == 4 && qkv.size(1) % (3 * heads) == 0 && qkv.numel() > 0,
          "esc_arch::window_attention_cpu: qkv must be (B, 3C, H, W), C a multiple of the heads, and not empty.");
  require(qkv.is_float(), "esc_arch::window_attention_cpu: qkv must be float32.");
  check_bias(bias, key_factors, window, heads);
}

// A map of `channels` in the layout of qkv
Tensor map_like(const Tensor& qkv, int64_t channels) {
  const Dimensions sizes{qkv.size(0), channels, qkv.size(2), qkv.size(3)};
  return qkv.stride(1) == 1 ? empty_map(sizes) : empty(sizes);
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, const Tensor& bias,
                                            const std::optional<Tensor>& key_factors, int64_t window, int64_t heads) {
  check(qkv, bias, key_factors, window, heads);
  const Shape s(qkv, key_factors ? bias.size(2) : 0, window, heads);
  Tensor out = map_like(qkv, qkv.size(1) / 3);
  Tensor statistics = empty({2, s.heads, s.windows, s.tokens});
  const Map in(qkv), to(out);
  float* all_statistics = statistics.data();
  const Biases biases(bias, key_factors, s);
  // (The heads of a window one after the other: they share its pages of memory)
  for_each_task(s.heads * s.windows, [&] { return ForwardScratch(s); }, [&](int64_t task, ForwardScratch& scratch) {
    const int64_t index = task / s.heads, head = task % s.heads;
    const Window at(s, index);
    attend_window(s, biases.of_head(head), Head(s, in, head), at, {0, Pair::number(at)}, scratch,
                  Statistics(all_statistics, s, head * s.windows + index), to);
  });
  return {out, statistics};
}

// --- the layer -----------------------------------------------------------------------------------------------------

// A 1 x 1 convolution's weight (O, C, 1, 1) as (C, O rounded up to vectors), and its bias
struct Projection {
  int64_t depth, vectors;
  Floats weight, bias;

  Projection(const Tensor& given, const std::optional<Tensor>& given_bias)
      : depth(given.size(1)), vectors(padded(given.size(0)) / V), weight(depth * vectors * V), bias(vectors * V) {
    const Tensor whole = given.contiguous();
    const float* from = whole.data();
    std::memset(weight.data(), 0, depth * vectors * V * sizeof(float));
    std::memset(bias.data(), 0, vectors * V * sizeof(float));
    for (int64_t o = 0; o < given.size(0); ++o)
      for (int64_t c = 0; c < depth; ++c) weight[c * vectors * V + o] = from[o * depth + c];
    if (given_bias) {
      const Tensor contiguous = given_bias->contiguous();
      std::memcpy(bias.data(), contiguous.data(), given.size(0) * sizeof(float));
    }
  }

  // use(row, vector, sums) for the projected rows of a, `depth` floats each
  template <typename Use>
  void operator()(const float* a, int64_t rows, Use use) const {
    product(rows, vectors, depth, {a, depth, 1}, weight.data(), vectors * V, bias.data(), use);
  }
};

// x (if it is residual) + to_out(attention(to_qkv(norm(x)))), window by window: what lies between x and the result is
// kept for as many windows as are worked on at a time. A chunk is some rows of a window.
class Layer {
 public:
  Layer(const Tensor& x, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
        double eps, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& bias,
        const std::optional<Tensor>& key_factors, const Tensor& out_weight,
        const std::optional<Tensor>& out_bias, int64_t window, int64_t heads, bool residual, Tensor& out)
      : s_(x.size(0), x.size(1), x.size(2), x.size(3), key_factors ? bias.size(2) : 0, window, heads),
        of_window_(1, x.size(1), window, window, s_.rank, window, heads), channels_(x.size(1)),
        chunk_rows_(rows_of_block(s_)), chunks_((window + chunk_rows_ - 1) / chunk_rows_), x_(x), out_(out),
        norm_weight_(norm_weight ? norm_weight->contiguous() : Tensor()),
        norm_bias_(norm_bias ? norm_bias->contiguous() : Tensor()), eps_(eps), to_qkv_(qkv_weight, qkv_bias),
        to_out_(out_weight, out_bias), biases_(bias, key_factors, of_window_), residual_(residual),
        token_(s_.dim % V == 0 ? s_.dim : to_qkv_.vectors * V), places_(to_qkv_.vectors) {
    for (int64_t v = 0; v < to_qkv_.vectors; ++v)
      places_[v] = v * V / token_ * s_.tokens * token_ + v * V % token_;
  }

  void run() const {
    const int64_t threads = get_num_threads();
    // A few windows are shared by the threads; of many, each thread takes one after the other, which stays in its cache
    if (threads > 1 && s_.windows < 4 * threads)
      together(threads);
    else
      apart();
  }

 private:
  // Of some windows: (windows, 3h, N, d), or (windows, N, 3C rounded up to vectors) where d is no multiple of a
  // vector; and (windows, N, C)
  struct Buffers {
    Floats qkv, attended;

    Buffers(const Layer& layer, int64_t windows)
        : qkv(windows * layer.s_.tokens * layer.to_qkv_.vectors * V),
          attended(windows * layer.s_.tokens * layer.channels_) {}
  };

  struct Scratch : ForwardScratch {
    Floats normed;

    explicit Scratch(const Layer& layer)
        : ForwardScratch(layer.of_window_), normed(layer.chunk_rows_ * layer.s_.window * layer.channels_) {}
  };

  struct Own {
    Buffers buffers;
    Scratch scratch;
  };

  void apart() const {
    for_each_task(s_.windows, [&] { return Own{Buffers(*this, 1), Scratch(*this)}; }, [&](int64_t index, Own& own) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) project(index, 0, chunk, own.buffers, own.scratch);
      for (int64_t head = 0; head < s_.heads; ++head) attend(index, 0, head, 0, 1, own.buffers, own.scratch);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) finish(index, 0, chunk, own.buffers);
    });
  }

  void together(int64_t threads) const {
    Buffers buffers(*this, s_.windows);
    const auto make_scratch = [&] { return Scratch(*this); };
    for_each_task(s_.windows * chunks_, make_scratch, [&](int64_t task, Scratch& scratch) {
      project(task / chunks_, task / chunks_, task % chunks_, buffers, scratch);
    });
    const int64_t all_heads = s_.windows * s_.heads, parts = (2 * threads + all_heads - 1) / all_heads;
    for_each_task(all_heads * parts, make_scratch, [&](int64_t task, Scratch& scratch) {
      const int64_t index = task / parts / s_.heads;
      attend(index, index, task / parts % s_.heads, task % parts, parts, buffers, scratch);
    });
    for_each_task(s_.windows * chunks_, make_scratch, [&](int64_t task, Scratch&) {
      finish(task / chunks_, task / chunks_, task % chunks_, buffers);
    });
  }

  int64_t rows_of_chunk(int64_t chunk) const {
    return std::min(chunk_rows_, s_.window - chunk * chunk_rows_);
  }

  void project(int64_t index, int64_t slot, int64_t chunk, Buffers& buffers, Scratch& scratch) const {
    const Window at(s_, index);
    const int64_t first = chunk * chunk_rows_, rows = rows_of_chunk(chunk);
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t row = reflected(at.top + first + y, s_.height);
      float* tokens = scratch.normed.data() + y * s_.window * channels_;
      norm(x_.at(at.b, 0, row, at.left), at.width, tokens);
      for (int64_t x = at.width; x < s_.window; ++x)
        norm(x_.at(at.b, 0, row, reflected(at.left + x, s_.width)), 1, tokens + x * channels_);
    }
    float* qkv = buffers.qkv.data() + slot * s_.tokens * to_qkv_.vectors * V + first * s_.window * token_;
    to_qkv_(scratch.normed.data(), rows * s_.window,
            [&](int64_t token, int64_t v, Vec sums) { store(qkv + token * token_ + places_[v], sums); });
  }

  void norm(const float* pixels, int64_t count, float* tokens) const {
    if (!norm_weight_.defined()) {
      std::memcpy(tokens, pixels, count * channels_ * sizeof(float));
      return;
    }
    normalise(count, channels_, pixels, norm_weight_.data(), norm_bias_.data(), eps_,
              [&](int64_t pixel, int64_t c, int64_t lanes, Vec normal) {
                store_count(tokens + pixel * channels_ + c, normal, lanes);
              });
  }

  void attend(int64_t index, int64_t slot, int64_t head, int64_t part, int64_t parts, Buffers& buffers,
              Scratch& scratch) const {
    Window at(s_, index);
    const int64_t pairs = Pair::number(at);
    at.b = at.top = at.left = 0;
    float* qkv = buffers.qkv.data() + slot * s_.tokens * to_qkv_.vectors * V;
    const auto map = [&](int64_t kind) {
      const int64_t channel = (kind * s_.heads + head) * s_.dim;
      return Map(qkv + places_[channel / V] + channel % V, s_.window, token_);
    };
    attend_window(of_window_, biases_.of_head(head), {head, map(0), map(1), map(2)}, at,
                  {part * pairs / parts, (part + 1) * pairs / parts}, scratch, Statistics(),
                  Map(buffers.attended.data() + slot * s_.tokens * channels_, s_.window, channels_));
  }

  void finish(int64_t index, int64_t slot, int64_t chunk, Buffers& buffers) const {
    const Window at(s_, index);
    const int64_t first = chunk * chunk_rows_, rows = std::min(rows_of_chunk(chunk), at.height - first);
    if (rows <= 0) return;
    const auto finish_tokens = [&](int64_t y, int64_t count) {
      const float* tokens = buffers.attended.data() + (slot * s_.tokens + y * s_.window) * channels_;
      to_out_(tokens, count, [&](int64_t token, int64_t v, Vec sums) {
        const int64_t column = at.left + token % s_.window, row = at.top + y + token / s_.window;
        const int64_t lanes = std::min<int64_t>(V, channels_ - v * V);
        if (residual_) sums += load_count(x_.at(at.b, v * V, row, column), lanes);
        store_count(out_.at(at.b, v * V, row, column), sums, lanes);
      });
    };
    if (at.width == s_.window)
      finish_tokens(first, rows * s_.window);
    else
      for (int64_t y = first; y < first + rows; ++y) finish_tokens(y, at.width);
  }

  Shape s_, of_window_;
  int64_t channels_, chunk_rows_, chunks_;
  Map x_, out_;
  Tensor norm_weight_, norm_bias_;
  float eps_;
  Projection to_qkv_, to_out_;
  Biases biases_;
  bool residual_;
  int64_t token_;                // floats from a token's queries to the next one's
  std::vector<int64_t> places_;  // of each vector of a token's projection
};

bool is_projection(const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs, int64_t inputs) {
  return weight.sizes() == Dimensions{outputs, inputs, 1, 1} && weight.is_float() &&
         (!bias || (bias->sizes() == Dimensions{outputs} && bias->is_float()));
}

Tensor window_attention_fused(const Tensor& x, const std::optional<Tensor>& norm_weight,
                              const std::optional<Tensor>& norm_bias, double eps, const Tensor& qkv_weight,
                              const std::optional<Tensor>& qkv_bias, const Tensor& bias,
                              const std::optional<Tensor>& key_factors, const Tensor& out_weight,
                              const std::optional<Tensor>& out_bias, int64_t window, int64_t heads, bool residual) {
  require(window >= 1 && heads >= 1 && x.dim() == 4 && x.size(1) % heads == 0 && x.is_float(),
          "esc_arch::window_attention_fused_cpu: x must be (B, C, H, W), C a multiple of the heads, and float32.");
  const int64_t channels = x.size(1);
  require(is_projection(qkv_weight, qkv_bias, 3 * channels, channels) &&
              is_projection(out_weight, out_bias, channels, channels),
          "esc_arch::window_attention_fused_cpu: the weights must be (3C, C, 1, 1) and (C, C, 1, 1), float32.");
  require(norm_weight.has_value() == norm_bias.has_value(),
          "esc_arch::window_attention_fused_cpu: the norm must have a weight and a bias, or neither.");
  for (const auto& part : {norm_weight, norm_bias})
    require(!part || (part->sizes() == Dimensions{channels} && part->is_float()),
            "esc_arch::window_attention_fused_cpu: the norm's weight and bias must be (C) and float32.");
  check_bias(bias, key_factors, window, heads);
  Tensor out = empty_map(x.sizes());
  if (out.numel() == 0) return out;
  Layer(x.channels_last(), norm_weight, norm_bias, eps, qkv_weight, qkv_bias, bias,
        key_factors, out_weight, out_bias, window, heads, residual, out)
      .run();
  return out;
}

// --- backward ------------------------------------------------------------------------------------------------------

// At most so many chunks of a head's windows have a place of their own for gradients of the bias
constexpr int64_t CHUNKS = 16;

struct BackwardScratch {
  Floats k, v, key_bounds, dk, dv, rows, q, grad_rows, grad, out_rows, p, ds, dq, dbias;

  explicit BackwardScratch(const Shape& s)
      : k(s.tokens * s.stride), v(s.tokens * s.value_stride), key_bounds(s.stride),
        dk((s.tokens + GRADIENTS) * s.stride), dv((s.tokens + GRADIENTS) * s.value_stride), rows(PAIR * s.stride),
        q(PAIR * s.inner), grad_rows(PAIR * s.value_stride), grad(PAIR * s.dim), out_rows(PAIR * s.value_stride),
        p(room_of_block(s)), ds(room_of_block(s)), dq(PAIR * s.stride),
        dbias(s.rank ? 0 : s.side * s.window * s.vectors * V) {}
};

// Gradients of the products of a pair with a block of keys: p becomes the weights before they are divided by their
// sum, ds their scores' gradients. (The output's gradient is divided by the sum instead.)
template <bool Bounded>
void differentiate(const Shape& s, const Bias& bias, const Pair& pair, int64_t first, int64_t rows,
                   const Vec* maximum, const Vec* delta, BackwardScratch& scratch) {
  const int64_t keys = rows * s.window;
  float *p = scratch.p.data(), *ds = scratch.ds.data();
  Weights<Bounded, false> weights{p, {maximum[0], maximum[1]}, {}};
  scores(scratch.q.data(), scratch.k.data(), s, bias, pair, first, rows, weights);
  ScoreGradients gradients{p, ds, {delta[0], delta[1]}};
  products(scratch.grad.data(), scratch.v.data() + first * s.window * s.value_stride, keys, s.dim, s.value_stride,
           nullptr, nullptr, gradients);
  const int64_t added = round_up(keys, GRADIENTS) - keys;
  for (float* room : {p, ds}) std::memset(room + keys * PAIR, 0, added * PAIR * sizeof(float));
}

// Adds the scores' gradients of a pair to dbias(ky - qy, kx, qx): where they belong in the table the vectors of
// neighbouring keys would overlap, and each addition wait for the one before
void add_to_bias(const Shape& s, const Pair& pair, int64_t first, int64_t rows, const float* ds, float* dbias) {
  const int64_t stride = s.vectors * V;
  for (int j = 0; j < pair.count; ++j)
    for (int64_t y = 0; y < rows; ++y) {
      float* place = dbias + (first + y - pair.row[j] + s.window - 1) * s.window * stride + pair.column[j];
      for (int64_t x = 0; x < s.window; ++x, place += stride)
        store(place, load(place) + load(ds + (y * s.window + x) * PAIR + j * V));
    }
}

// dbias(ky - qy, kx, qx) to the table's gradient
void fold_bias(const Shape& s, const float* dbias, float* table) {
  std::memset(table, 0, s.table * sizeof(float));
  for (int64_t row = 0; row < s.side; ++row, table += s.side)
    for (int64_t key = 0; key < s.window; ++key, dbias += s.vectors * V)
      for (int64_t query = 0; query < s.window; ++query) table[key - query + s.window - 1] += dbias[query];
}

// One pair's part of all gradients: dk and dv of the window, dq of the pair, and of the bias
template <bool Bounded>
void differentiate_pair(const Shape& s, const Bias& bias, const Pair& pair, const Vec* maximum, const Vec* delta,
                        BackwardScratch& scratch) {
  const Vec one[2] = {broadcast(1.0f), broadcast(1.0f)};
  std::memset(scratch.dq.data(), 0, PAIR * s.stride * sizeof(float));
  const int64_t step = rows_of_block(s);
  for (int64_t first = 0; first < s.window; first += step) {
    const int64_t rows = std::min(step, s.window - first), start = first * s.window;
    const int64_t keys = round_up(rows * s.window, GRADIENTS);
    differentiate<Bounded>(s, bias, pair, first, rows, maximum, delta, scratch);
    accumulate_keys(scratch.p.data(), scratch.grad_rows.data(), keys, s.dim, s.value_stride,
                    scratch.dv.data() + start * s.value_stride);
    accumulate_keys(scratch.ds.data(), scratch.rows.data(), keys, s.inner, s.stride,
                    scratch.dk.data() + start * s.stride);
    accumulate_queries(scratch.ds.data(), scratch.k.data() + start * s.stride, rows * s.window, s.inner, s.stride, one,
                       scratch.dq.data());
    if (bias.table) add_to_bias(s, pair, first, rows, scratch.ds.data(), scratch.dbias.data());
  }
}

// The sum over d of what goes into the softmax's gradient for every query: gradient times output
void row_sums(const float* grad_rows, const float* out_rows, const Shape& s, Vec* delta) {
  for (int i = 0; i < PAIR; ++i) {
    float sum = 0;
    for (int64_t c = 0; c < s.dim; ++c) sum += grad_rows[i * s.value_stride + c] * out_rows[i * s.value_stride + c];
    delta[i / V][i % V] = sum;
  }
}

// Gradients of a window's keys or values: to the map, and for tokens that are reflections to a map of the padded size
void unpack_tokens(const float* in, int64_t stride, float factor, const Shape& s, const Window& at, int64_t channel,
                   const Map& out, int64_t padded_channel, const std::optional<Map>& padded) {
  for (int64_t y = 0; y < s.window; ++y)
    for (int64_t x = 0; x < s.window; ++x) {
      const bool inside = y < at.height && x < at.width;
      float* target = inside ? out.at(at.b, channel, at.top + y, at.left + x)
                             : padded->at(at.b, padded_channel, at.top + y, at.left + x);
      const int64_t step = inside ? out.channel : padded->channel;
      scatter(in + (y * s.window + x) * stride, s.dim, factor, target, step);
    }
}

// Adds the gradients of reflections to those of the pixels that they show
void fold_padding(const Shape& s, const Map& padded, const Map& out) {
  const int64_t channels = s.heads * s.dim;
  parallel_for(0, s.batch * 2 * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (2 * channels), c = i % (2 * channels);
      for (int64_t y = 0; y < s.rows * s.window; ++y)
        for (int64_t x = y < s.height ? s.width : 0; x < s.columns * s.window; ++x)
          *out.at(b, channels + c, reflected(y, s.height), reflected(x, s.width)) += *padded.at(b, c, y, x);
    }
  });
}

// The sum over the second dimension, in double precision: (a, n, m) to (a, m)
void sum_chunks(const float* in, int64_t groups, int64_t chunks, int64_t size, float* out) {
  parallel_for(0, groups * size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += in[(i / size * chunks + c) * size + i % size];
      out[i] = static_cast<float>(sum);
    }
  });
}

// What the backward of one chunk works with
struct Backward {
  const Shape& s;
  Map qkv, grad, out, dqkv;
  std::optional<Map> padded;
  float* statistics;

  // All windows of a chunk, of one head; adds to dk of the factors, which stay behind the window's own dimensions
  void window(const Window& at, int64_t index, int64_t head, const Bias& bias, BackwardScratch& scratch,
              float* query_factors, float* key_factors) const {
    const Statistics of_window(statistics, s, head * s.windows + index);
    pack_tokens(qkv, s, at, (s.heads + head) * s.dim, scratch.k.data(), s.stride);
    pack_tokens(qkv, s, at, (2 * s.heads + head) * s.dim, scratch.v.data(), s.value_stride);
    if (bias.key_factors) pack_factors(bias.key_factors, s, scratch.k.data());
    bound_keys(scratch.k.data(), s, scratch.key_bounds.data());
    std::memset(scratch.dk.data(), 0, (s.tokens + GRADIENTS) * s.stride * sizeof(float));
    std::memset(scratch.dv.data(), 0, (s.tokens + GRADIENTS) * s.value_stride * sizeof(float));
    for (int64_t i = 0; i < Pair::number(at); ++i) {
      const Pair pair(at, i);
      Vec maximum[2], inverse_sum[2] = {}, delta[2];
      for (int j = 0; j < 2; ++j) {
        maximum[j] = broadcast(1e30f);  // lanes without a query get no weights, whatever their scores
        if (j == pair.count) continue;
        const int64_t bytes = s.lanes(pair.column[j]) * sizeof(float);
        std::memcpy(&maximum[j], of_window.maximum + pair.token(s, j), bytes);
        std::memcpy(&inverse_sum[j], of_window.inverse_sum + pair.token(s, j), bytes);
      }
      pack_queries(qkv, bias.query_factors, s, at, pair, head, scratch.rows.data());
      transpose_pair(scratch.rows.data(), s.stride, s.inner, scratch.q.data());
      pack_pair(grad, s, at, pair, head * s.dim, 1.0f, scratch.grad_rows.data(), s.value_stride);
      for (int64_t query = 0; query < PAIR; ++query)
        for (int64_t c = 0; c < s.dim; ++c)
          scratch.grad_rows[query * s.value_stride + c] *= inverse_sum[query / V][query % V];
      transpose_pair(scratch.grad_rows.data(), s.value_stride, s.dim, scratch.grad.data());
      pack_pair(out, s, at, pair, head * s.dim, 1.0f, scratch.out_rows.data(), s.value_stride);
      row_sums(scratch.grad_rows.data(), scratch.out_rows.data(), s, delta);
      const bool easy = bounded(scratch.q.data(), scratch.key_bounds.data(), s, bias);
      (easy ? differentiate_pair<true> : differentiate_pair<false>)(s, bias, pair, maximum, delta, scratch);
      unpack_pair(scratch.dq.data(), s, at, pair, head * s.dim, s.scale, dqkv);
      if (query_factors) add_query_factors(pair, at, scratch.dq.data(), query_factors);
    }
    // The queries that the keys' gradients are sums of were in powers of 2
    unpack_tokens(scratch.dk.data(), s.stride, LN_2, s, at, (s.heads + head) * s.dim, dqkv, head * s.dim, padded);
    unpack_tokens(scratch.dv.data(), s.value_stride, 1, s, at, (2 * s.heads + head) * s.dim, dqkv,
                  (s.heads + head) * s.dim, padded);
    if (key_factors)
      for (int64_t token = 0; token < s.tokens; ++token)
        for (int64_t r = 0; r < s.rank; ++r)
          key_factors[token * s.rank + r] += LN_2 * scratch.dk[token * s.stride + s.dim + r];
  }

  void add_query_factors(const Pair& pair, const Window& at, const float* dq, float* out) const {
    for (int j = 0; j < pair.count; ++j)
      for (int64_t i = 0; i < std::min<int64_t>(V, at.width - pair.column[j]); ++i)
        for (int64_t r = 0; r < s.rank; ++r)
          out[(pair.row[j] * s.window + pair.column[j] + i) * s.rank + r] += dq[(s.dim + r) * PAIR + j * V + i];
  }
};

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& bias, const std::optional<Tensor>& key_factors,
    const Tensor& out, const Tensor& statistics, int64_t window, int64_t heads) {
  check(qkv, bias, key_factors, window, heads);
  require(grad.sizes() == out.sizes() && grad.is_float() && statistics.is_contiguous(),
          "esc_arch::window_attention_backward_cpu: the gradient must be float32 and like the output.");
  const Shape s(qkv, key_factors ? bias.size(2) : 0, window, heads);
  Tensor dqkv = map_like(qkv, qkv.size(1));
  Tensor dbias = empty(bias.sizes());
  Tensor dkey_factors = key_factors ? empty(key_factors->sizes()) : empty({0});
  Tensor padded;
  Backward work{s, Map(qkv), Map(grad), Map(out), Map(dqkv), std::nullopt, statistics.data()};
  if (s.height % window || s.width % window) {
    padded = empty_channels_last({s.batch, 2 * heads * s.dim, s.rows * window, s.columns * window});
    work.padded = Map(padded);
  }
  const int64_t chunks = std::min(CHUNKS, s.windows), of_chunk = bias.numel() / heads;
  Floats parts(heads * chunks * of_chunk), key_parts(key_factors ? heads * chunks * of_chunk : 0);
  const Biases biases(bias, key_factors, s);
  for_each_task(heads * chunks, [&] { return BackwardScratch(s); }, [&](int64_t task, BackwardScratch& scratch) {
    const int64_t head = task / chunks, chunk = task % chunks;
    const Bias of_head = biases.of_head(head);
    float* part = parts.data() + task * of_chunk;
    float* key_part = key_factors ? key_parts.data() + task * of_chunk : nullptr;
    if (key_factors)
      for (float* factor : {part, key_part}) std::memset(factor, 0, of_chunk * sizeof(float));
    else
      std::memset(scratch.dbias.data(), 0, s.side * s.window * s.vectors * V * sizeof(float));
    for (int64_t i = chunk * s.windows / chunks; i < (chunk + 1) * s.windows / chunks; ++i)
      work.window(Window(s, i), i, head, of_head, scratch, key_factors ? part : nullptr, key_part);
    if (!key_factors) fold_bias(s, scratch.dbias.data(), part);
  });
  if (work.padded) fold_padding(s, *work.padded, work.dqkv);
  sum_chunks(parts.data(), heads, chunks, of_chunk, dbias.data());
  if (key_factors) sum_chunks(key_parts.data(), heads, chunks, of_chunk, dkey_factors.data());
  return {dqkv, dbias, dkey_factors};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def(
      "window_attention_cpu(Tensor qkv, Tensor bias, Tensor? key_factors, int window, int heads) "
      "-> (Tensor, Tensor)");
  m.def(
      "window_attention_fused_cpu(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight, "
      "Tensor? qkv_bias, Tensor bias, Tensor? key_factors, Tensor out_weight, Tensor? out_bias, int window, int heads, "
      "bool residual) -> Tensor");
  m.def(
      "window_attention_backward_cpu(Tensor grad, Tensor qkv, Tensor bias, Tensor? key_factors, Tensor out, "
      "Tensor statistics, int window, int heads) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("window_attention_cpu", ESC_ARCH_KERNEL(window_attention));
  m.impl("window_attention_fused_cpu", ESC_ARCH_KERNEL(window_attention_fused));
  m.impl("window_attention_backward_cpu", ESC_ARCH_KERNEL(window_attention_backward));
}
