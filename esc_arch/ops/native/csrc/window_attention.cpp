// Window attention on the CPU, forward and backward, float32: no window copies, no (tokens x tokens) tensor.
//
// Letters: B batch, C channels, H, W the map, h heads, d head dimension, w window side, N = w * w tokens,
// V floats of a vector, r rank of the bias factors.
//
// A task is one head of one window. A vector holds V queries next to each other in one row of the window, so the
// biases of these queries towards one key lie side by side in the table once its columns are reversed, and are read
// with one load. Two vectors of queries (a pair) meet a block of keys at a time; scores stay in the L1 cache. The
// softmax is the online one. Factors of the bias are further dimensions of q and k.
//
// Nothing depends on the number of threads: each task or chunk of tasks has its own place for results, and sums
// over those are made in a fixed order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "vectors.h"

namespace {

using namespace esc_arch;

constexpr int V = kLanes;

// Dimensions that are accumulated at a time in registers, and keys whose scores are: AVX2 has 16 of them, others 32
constexpr int DIMS = V == 8 ? 4 : 8;
constexpr int KEYS = V == 8 ? 4 : 8;
constexpr int BLOCK = 64;
constexpr int PAIR = 2 * V;
// Of e^x on [-log(2) / 2, log(2) / 2]: the least relative error (4e-9) of those that begin with 1 + x
constexpr float EXPONENTIAL[] = {1.0f, 1.0f, 0.49999994f, 0.166665196f, 0.0416684002f, 0.00836885069f, 0.00138143206f};

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

// e^x for x <= 88, within 2 units in the last place; below -87 as there.
ESC_ARCH_INLINE Vec exponential(Vec x) {
  x = max(x, broadcast(-87.0f));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec power = shifted - 12582912.0f;
  // (One constant is enough for log(2): off by 2e-9, times a power that is small where the result is not)
  return (Vec)((IntVec)polynomial(EXPONENTIAL, x - power * 0.693147182f) + ((IntVec)shifted << 23));
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
  const int64_t period = std::max<int64_t>(2 * size - 2, 1);
  index %= period;
  return std::min(index, period - index);
}

// A (B, channels, H, W) tensor by its strides
struct Map {
  float* data;
  int64_t batch, channel, row, column;

  explicit Map(const at::Tensor& x)
      : data(x.data_ptr<float>()), batch(x.stride(0)), channel(x.stride(1)), row(x.stride(2)), column(x.stride(3)) {}

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

  Shape(const at::Tensor& qkv, int64_t rank, int64_t window, int64_t heads)
      : batch(qkv.size(0)), heads(heads), dim(qkv.size(1) / (3 * heads)), rank(rank), height(qkv.size(2)),
        width(qkv.size(3)), window(window), tokens(window * window), rows((height + window - 1) / window),
        columns((width + window - 1) / window), windows(batch * rows * columns), inner(dim + rank),
        stride(round_up(inner, std::max(V, DIMS))), value_stride(round_up(dim, std::max(V, DIMS))),
        vectors((window + V - 1) / V), side(2 * window - 1), table(side * side),
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

// The bias of every pair of tokens: the table with its columns reversed, or nothing
struct Bias {
  const float* table = nullptr;
  int64_t window = 0, side = 0;

  const float* row(const Pair& pair, int j, int64_t key_row) const {
    if (!table) return nullptr;
    return table + (key_row - pair.row[j] + window - 1) * side + pair.column[j] + window - 1;
  }
};

// (h, (2w - 1)^2) with reversed columns; more floats, because the last lanes of a row that is no multiple of V read
// past it
Floats reversed_table(const at::Tensor& table, const Shape& s) {
  Floats result(s.heads * s.table + 2 * V);
  std::memset(result.data() + s.heads * s.table, 0, 2 * V * sizeof(float));
  const float* data = table.data_ptr<float>();
  for (int64_t row = 0; row < s.heads * s.side; ++row)
    for (int64_t i = 0; i < s.side; ++i)
      result[row * s.side + i] = data[row * s.side + s.side - 1 - i];
  return result;
}

// `count` channels of every token of a window, token after token, those outside the map by reflection
void pack_tokens(const Map& map, const Shape& s, const Window& at, int64_t channel, float* out, int64_t stride) {
  std::memset(out, 0, s.tokens * stride * sizeof(float));
  for (int64_t y = 0; y < s.window; ++y) {
    const int64_t source_row = reflected(at.top + y, s.height);
    for (int64_t x = 0; x < s.window; ++x) {
      const float* source = map.at(at.b, channel, source_row, reflected(at.left + x, s.width));
      float* target = out + (y * s.window + x) * stride;
      if (map.channel == 1)
        std::memcpy(target, source, s.dim * sizeof(float));
      else
        for (int64_t c = 0; c < s.dim; ++c) target[c] = source[c * map.channel];
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
      for (int64_t c = 0; c < s.dim; ++c) out[(j * V + i) * stride + c] = factor * source[c * map.channel];
    }
}

// q of a pair times the scale, and the queries' factors of the bias
void pack_queries(const Map& qkv, const float* factors, const Shape& s, const Window& at, const Pair& pair,
                  int64_t head, float* out) {
  pack_pair(qkv, s, at, pair, head * s.dim, s.scale, out, s.stride);
  if (!factors) return;
  for (int j = 0; j < pair.count; ++j)
    for (int64_t i = 0; i < s.lanes(pair.column[j]); ++i)
      std::memcpy(out + (j * V + i) * s.stride + s.dim,
                  factors + (pair.row[j] * s.window + pair.column[j] + i) * s.rank, s.rank * sizeof(float));
}

// (2V, stride) to (dims, 2V)
void transpose_pair(const float* in, int64_t stride, int64_t dims, float* out) {
  for (int64_t i = 0; i < PAIR; ++i)
    for (int64_t c = 0; c < dims; ++c) out[c * PAIR + i] = in[i * stride + c];
}

// out(key, 2V) = bias + sum over c of q(c, 2V) k(key, c), and the largest of them and of `largest`; D dims, 0 for any
template <int K, int D>
ESC_ARCH_INLINE void products_of(const float* q, const float* k, int64_t dims, int64_t stride, const float* bias0,
                                 const float* bias1, float* out, Vec* largest) {
  Vec sum[K][2];
  for (int i = 0; i < K; ++i) {
    sum[i][0] = bias0 ? load(bias0 - i) : Vec{};
    sum[i][1] = bias0 ? load(bias1 - i) : Vec{};
  }
  const auto add = [&](int64_t c) {
    const Vec first = load(q + c * PAIR), second = load(q + c * PAIR + V);
    for (int i = 0; i < K; ++i) {
      const Vec key = broadcast(k[i * stride + c]);
      sum[i][0] += first * key;
      sum[i][1] += second * key;
    }
  };
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int c = 0; c < D; ++c) add(c);
  } else {
    for (int64_t c = 0; c < dims; ++c) add(c);
  }
  for (int i = 0; i < K; ++i)
    for (int j = 0; j < 2; ++j) store(out + i * PAIR + j * V, sum[i][j]);
  for (int j = 0; j < 2; ++j) {
    for (int half = K / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sum[i][j] = max(sum[i][j], sum[i + half][j]);
    largest[j] = max(largest[j], sum[0][j]);
  }
}

template <int D>
void products_in(const float* q, const float* k, int64_t keys, int64_t dims, int64_t stride, const float* bias0,
                 const float* bias1, float* out, Vec* largest) {
  int64_t i = 0;
  for (; i + KEYS <= keys; i += KEYS)
    products_of<KEYS, D>(q, k + i * stride, dims, stride, bias0 ? bias0 - i : nullptr, bias0 ? bias1 - i : nullptr,
                         out + i * PAIR, largest);
  for (; i < keys; ++i)
    products_of<1, 0>(q, k + i * stride, dims, stride, bias0 ? bias0 - i : nullptr, bias0 ? bias1 - i : nullptr,
                      out + i * PAIR, largest);
}

void products(const float* q, const float* k, int64_t keys, int64_t dims, int64_t stride, const float* bias0,
              const float* bias1, float* out, Vec* largest) {
  // The head dimension of all published networks is worth a loop of its own
  const auto run = dims == 16 ? products_in<16> : products_in<0>;
  run(q, k, keys, dims, stride, bias0, bias1, out, largest);
}

// Scores of a pair towards whole rows of keys
void scores(const float* q, const float* k, const Shape& s, const Bias& bias, const Pair& pair, int64_t first_row,
            int64_t rows, float* out, Vec* largest) {
  for (int64_t y = first_row; y < first_row + rows; ++y, out += s.window * PAIR)
    products(q, k + y * s.window * s.stride, s.window, s.inner, s.stride, bias.row(pair, 0, y), bias.row(pair, 1, y),
             out, largest);
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

// out(key, stride) += sum over the pair's queries of p(key, query) rows(query, stride); keys a multiple of KEYS
void accumulate_keys(const float* p, const float* rows, int64_t keys, int64_t dims, int64_t stride, float* out) {
  for (int64_t first = 0; first < keys; first += KEYS)
    for (int64_t c = 0; c < dims; c += V) {
      Vec sum[KEYS];
      for (int i = 0; i < KEYS; ++i) sum[i] = load(out + (first + i) * stride + c);
      for (int64_t query = 0; query < PAIR; ++query) {
        const Vec row = load(rows + query * stride + c);
        for (int i = 0; i < KEYS; ++i) sum[i] += broadcast(p[(first + i) * PAIR + query]) * row;
      }
      for (int i = 0; i < KEYS; ++i) store(out + (first + i) * stride + c, sum[i]);
    }
}

// Rows of keys that are worked on at a time
int64_t rows_of_block(const Shape& s) {
  return std::max<int64_t>(1, std::min<int64_t>(s.window, BLOCK / s.window));
}

int64_t room_of_block(const Shape& s) {
  return (rows_of_block(s) * s.window + KEYS) * PAIR;
}

// Runs work(task, its own scratch) for all tasks, handed out one by one because some threads are slower
template <typename Make, typename Work>
void for_each_task(int64_t tasks, const Make& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    auto scratch = make_scratch();
    for (int64_t task = next++; task < tasks; task = next++) work(task, scratch);
  });
}

// What the softmax of each of a window's queries was divided by: e^maximum / inverse_sum. (Their logarithm would be
// rounded to its own size.)
struct Statistics {
  float *maximum, *inverse_sum;

  // Of one task, in a tensor (2, h, windows, N)
  Statistics(float* all, const Shape& s, int64_t task)
      : maximum(all + task * s.tokens), inverse_sum(maximum + s.heads * s.windows * s.tokens) {}
};

// --- forward -------------------------------------------------------------------------------------------------------

struct ForwardScratch {
  Floats k, v, rows, q, p, out;

  explicit ForwardScratch(const Shape& s)
      : k(s.tokens * s.stride), v(s.tokens * s.value_stride), rows(PAIR * s.stride), q(PAIR * s.inner),
        p(room_of_block(s)), out(PAIR * s.value_stride) {}
};

// The online softmax of a pair over all keys: out(d, 2V), and for the backward the queries' statistics
void attend(const Shape& s, const Bias& bias, const Pair& pair, ForwardScratch& scratch, const Statistics& statistics) {
  Vec maximum[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, sum[2] = {};
  std::memset(scratch.out.data(), 0, PAIR * s.value_stride * sizeof(float));
  const int64_t step = rows_of_block(s);
  for (int64_t first = 0; first < s.window; first += step) {
    const int64_t rows = std::min(step, s.window - first), keys = rows * s.window;
    float* p = scratch.p.data();
    Vec larger[2] = {maximum[0], maximum[1]}, shrink[2], block[2] = {};
    scores(scratch.q.data(), scratch.k.data(), s, bias, pair, first, rows, p, larger);
    for (int64_t i = 0; i < keys; ++i)
      for (int j = 0; j < 2; ++j) {
        const Vec weight = exponential(load(p + i * PAIR + j * V) - larger[j]);
        block[j] += weight;
        store(p + i * PAIR + j * V, weight);
      }
    for (int j = 0; j < 2; ++j) {
      shrink[j] = exponential(maximum[j] - larger[j]);
      maximum[j] = larger[j];
      sum[j] = sum[j] * shrink[j] + block[j];
    }
    accumulate_queries(p, scratch.v.data() + first * s.window * s.value_stride, keys, s.dim, s.value_stride, shrink,
                       scratch.out.data());
  }
  for (int j = 0; j < 2; ++j) {
    const Vec inverse = 1.0f / sum[j];
    for (int64_t c = 0; c < s.dim; ++c) {
      float* place = scratch.out.data() + c * PAIR + j * V;
      store(place, load(place) * inverse);
    }
    if (j < pair.count) {
      store_first(statistics.maximum + pair.token(s, j), maximum[j], s.lanes(pair.column[j]));
      store_first(statistics.inverse_sum + pair.token(s, j), inverse, s.lanes(pair.column[j]));
    }
  }
}

// (d, 2V) to the channels of a map, without what lies outside
void unpack_pair(const float* in, const Shape& s, const Window& at, const Pair& pair, int64_t channel, float factor,
                 const Map& out) {
  for (int j = 0; j < pair.count; ++j)
    for (int64_t i = 0; i < std::min<int64_t>(V, at.width - pair.column[j]); ++i) {
      float* target = out.at(at.b, channel, at.top + pair.row[j], at.left + pair.column[j] + i);
      for (int64_t c = 0; c < s.dim; ++c) target[c * out.channel] = factor * in[c * PAIR + j * V + i];
    }
}

struct Factors {
  const float *q = nullptr, *k = nullptr;

  // Of one head
  Factors(const at::Tensor& bias, const std::optional<at::Tensor>& key_factors, const Shape& s, int64_t head) {
    if (!key_factors) return;
    q = bias.data_ptr<float>() + head * s.tokens * s.rank;
    k = key_factors->data_ptr<float>() + head * s.tokens * s.rank;
  }
};

void check(const at::Tensor& qkv, const at::Tensor& bias, const std::optional<at::Tensor>& key_factors,
           int64_t window, int64_t heads) {
  TORCH_CHECK(window >= 1 && heads >= 1 && qkv.dim() == 4 && qkv.size(1) % (3 * heads) == 0 && qkv.numel() > 0,
              "esc_arch::cpu_window_attention: qkv must be (B, 3C, H, W), C a multiple of the heads, and not empty.");
  TORCH_CHECK(qkv.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat && bias.is_contiguous(),
              "esc_arch::cpu_window_attention: qkv and the contiguous bias must be float32.");
  if (!key_factors) {
    TORCH_CHECK(bias.dim() == 2 && bias.size(0) == heads && bias.size(1) == (2 * window - 1) * (2 * window - 1),
                "esc_arch::cpu_window_attention: the bias table must be (heads, (2 window - 1)^2).");
    return;
  }
  TORCH_CHECK(key_factors->scalar_type() == at::kFloat && key_factors->is_contiguous() && bias.dim() == 3 &&
                  bias.sizes() == key_factors->sizes() && bias.size(0) == heads && bias.size(1) == window * window,
              "esc_arch::cpu_window_attention: both factors of the bias must be contiguous, (heads, window^2, rank).");
}

// A map of `channels` in the layout of qkv
at::Tensor empty_map(const at::Tensor& qkv, int64_t channels) {
  return at::empty({qkv.size(0), channels, qkv.size(2), qkv.size(3)},
                   qkv.options().memory_format(qkv.stride(1) == 1 ? at::MemoryFormat::ChannelsLast
                                                                  : at::MemoryFormat::Contiguous));
}

std::tuple<at::Tensor, at::Tensor> window_attention(const at::Tensor& qkv, const at::Tensor& bias,
                                                    const std::optional<at::Tensor>& key_factors, int64_t window,
                                                    int64_t heads) {
  check(qkv, bias, key_factors, window, heads);
  const Shape s(qkv, key_factors ? bias.size(2) : 0, window, heads);
  at::Tensor out = empty_map(qkv, qkv.size(1) / 3);
  at::Tensor statistics = at::empty({2, s.heads, s.windows, s.tokens}, qkv.options());
  const Map in(qkv), to(out);
  float* all_statistics = statistics.data_ptr<float>();
  const Floats table = key_factors ? Floats(0) : reversed_table(bias, s);
  for_each_task(s.heads * s.windows, [&] { return ForwardScratch(s); }, [&](int64_t task, ForwardScratch& scratch) {
    const int64_t head = task / s.windows;
    const Window at(s, task % s.windows);
    const Factors factors(bias, key_factors, s, head);
    const Bias of_head{key_factors ? nullptr : table.data() + head * s.table, s.window, s.side};
    pack_tokens(in, s, at, (s.heads + head) * s.dim, scratch.k.data(), s.stride);
    pack_tokens(in, s, at, (2 * s.heads + head) * s.dim, scratch.v.data(), s.value_stride);
    if (factors.k) pack_factors(factors.k, s, scratch.k.data());
    for (int64_t i = 0; i < Pair::number(at); ++i) {
      const Pair pair(at, i);
      pack_queries(in, factors.q, s, at, pair, head, scratch.rows.data());
      transpose_pair(scratch.rows.data(), s.stride, s.inner, scratch.q.data());
      attend(s, of_head, pair, scratch, Statistics(all_statistics, s, task));
      unpack_pair(scratch.out.data(), s, at, pair, head * s.dim, 1.0f, to);
    }
  });
  return {out, statistics};
}

// --- backward ------------------------------------------------------------------------------------------------------

// At most so many chunks of a head's windows have a place of their own for gradients of the bias
constexpr int64_t CHUNKS = 16;

struct BackwardScratch {
  Floats k, v, dk, dv, rows, q, grad_rows, grad, out_rows, p, ds, dq, dbias;

  explicit BackwardScratch(const Shape& s)
      : k(s.tokens * s.stride), v(s.tokens * s.value_stride), dk((s.tokens + KEYS) * s.stride),
        dv((s.tokens + KEYS) * s.value_stride), rows(PAIR * s.stride), q(PAIR * s.inner),
        grad_rows(PAIR * s.value_stride), grad(PAIR * s.dim), out_rows(PAIR * s.value_stride), p(room_of_block(s)),
        ds(room_of_block(s)), dq(PAIR * s.stride),
        dbias(s.rank ? 0 : s.side * s.window * s.vectors * V) {}
};

// Gradients of the products of a pair with a block of keys: p becomes the weights before they are divided by their
// sum, ds their scores' gradients. (The output's gradient is divided by the sum instead.)
void differentiate(const Shape& s, const Bias& bias, const Pair& pair, int64_t first, int64_t rows,
                   const Vec* maximum, const Vec* delta, BackwardScratch& scratch) {
  const int64_t keys = rows * s.window;
  float *p = scratch.p.data(), *ds = scratch.ds.data();
  Vec largest[2] = {};
  scores(scratch.q.data(), scratch.k.data(), s, bias, pair, first, rows, p, largest);
  products(scratch.grad.data(), scratch.v.data() + first * s.window * s.value_stride, keys, s.dim, s.value_stride,
           nullptr, nullptr, ds, largest);
  for (int64_t i = 0; i < keys; ++i)
    for (int j = 0; j < 2; ++j) {
      const int64_t place = i * PAIR + j * V;
      const Vec weight = exponential(load(p + place) - maximum[j]);
      store(p + place, weight);
      store(ds + place, weight * (load(ds + place) - delta[j]));
    }
  for (float* room : {p, ds}) std::memset(room + keys * PAIR, 0, KEYS * PAIR * sizeof(float));
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
void differentiate_pair(const Shape& s, const Bias& bias, const Pair& pair, const Vec* maximum, const Vec* delta,
                        BackwardScratch& scratch) {
  const Vec one[2] = {broadcast(1.0f), broadcast(1.0f)};
  std::memset(scratch.dq.data(), 0, PAIR * s.stride * sizeof(float));
  const int64_t step = rows_of_block(s);
  for (int64_t first = 0; first < s.window; first += step) {
    const int64_t rows = std::min(step, s.window - first), start = first * s.window;
    const int64_t keys = round_up(rows * s.window, KEYS);
    differentiate(s, bias, pair, first, rows, maximum, delta, scratch);
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
void unpack_tokens(const float* in, int64_t stride, const Shape& s, const Window& at, int64_t channel, const Map& out,
                   int64_t padded_channel, const std::optional<Map>& padded) {
  for (int64_t y = 0; y < s.window; ++y)
    for (int64_t x = 0; x < s.window; ++x) {
      const bool inside = y < at.height && x < at.width;
      float* target = inside ? out.at(at.b, channel, at.top + y, at.left + x)
                             : padded->at(at.b, padded_channel, at.top + y, at.left + x);
      const int64_t step = inside ? out.channel : padded->channel;
      const float* source = in + (y * s.window + x) * stride;
      for (int64_t c = 0; c < s.dim; ++c) target[c * step] = source[c];
    }
}

// Adds the gradients of reflections to those of the pixels that they show
void fold_padding(const Shape& s, const Map& padded, const Map& out) {
  const int64_t channels = s.heads * s.dim;
  at::parallel_for(0, s.batch * 2 * channels, 1, [&](int64_t begin, int64_t end) {
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
  at::parallel_for(0, groups * size, 4096, [&](int64_t begin, int64_t end) {
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
  void window(const Window& at, int64_t index, int64_t head, const Bias& bias, const Factors& factors,
              BackwardScratch& scratch, float* query_factors, float* key_factors) const {
    const Statistics of_window(statistics, s, head * s.windows + index);
    pack_tokens(qkv, s, at, (s.heads + head) * s.dim, scratch.k.data(), s.stride);
    pack_tokens(qkv, s, at, (2 * s.heads + head) * s.dim, scratch.v.data(), s.value_stride);
    if (factors.k) pack_factors(factors.k, s, scratch.k.data());
    std::memset(scratch.dk.data(), 0, (s.tokens + KEYS) * s.stride * sizeof(float));
    std::memset(scratch.dv.data(), 0, (s.tokens + KEYS) * s.value_stride * sizeof(float));
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
      pack_queries(qkv, factors.q, s, at, pair, head, scratch.rows.data());
      transpose_pair(scratch.rows.data(), s.stride, s.inner, scratch.q.data());
      pack_pair(grad, s, at, pair, head * s.dim, 1.0f, scratch.grad_rows.data(), s.value_stride);
      for (int64_t query = 0; query < PAIR; ++query)
        for (int64_t c = 0; c < s.dim; ++c)
          scratch.grad_rows[query * s.value_stride + c] *= inverse_sum[query / V][query % V];
      transpose_pair(scratch.grad_rows.data(), s.value_stride, s.dim, scratch.grad.data());
      pack_pair(out, s, at, pair, head * s.dim, 1.0f, scratch.out_rows.data(), s.value_stride);
      row_sums(scratch.grad_rows.data(), scratch.out_rows.data(), s, delta);
      differentiate_pair(s, bias, pair, maximum, delta, scratch);
      unpack_pair(scratch.dq.data(), s, at, pair, head * s.dim, s.scale, dqkv);
      if (query_factors) add_query_factors(pair, at, scratch.dq.data(), query_factors);
    }
    unpack_tokens(scratch.dk.data(), s.stride, s, at, (s.heads + head) * s.dim, dqkv, head * s.dim, padded);
    unpack_tokens(scratch.dv.data(), s.value_stride, s, at, (2 * s.heads + head) * s.dim, dqkv,
                  (s.heads + head) * s.dim, padded);
    if (key_factors)
      for (int64_t token = 0; token < s.tokens; ++token)
        for (int64_t r = 0; r < s.rank; ++r)
          key_factors[token * s.rank + r] += scratch.dk[token * s.stride + s.dim + r];
  }

  void add_query_factors(const Pair& pair, const Window& at, const float* dq, float* out) const {
    for (int j = 0; j < pair.count; ++j)
      for (int64_t i = 0; i < std::min<int64_t>(V, at.width - pair.column[j]); ++i)
        for (int64_t r = 0; r < s.rank; ++r)
          out[(pair.row[j] * s.window + pair.column[j] + i) * s.rank + r] += dq[(s.dim + r) * PAIR + j * V + i];
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> window_attention_backward(
    const at::Tensor& grad, const at::Tensor& qkv, const at::Tensor& bias, const std::optional<at::Tensor>& key_factors,
    const at::Tensor& out, const at::Tensor& statistics, int64_t window, int64_t heads) {
  check(qkv, bias, key_factors, window, heads);
  TORCH_CHECK(grad.sizes() == out.sizes() && grad.scalar_type() == at::kFloat && statistics.is_contiguous(),
              "esc_arch::cpu_window_attention_backward: the gradient must be float32 and like the output.");
  const Shape s(qkv, key_factors ? bias.size(2) : 0, window, heads);
  at::Tensor dqkv = empty_map(qkv, qkv.size(1));
  at::Tensor dbias = at::empty_like(bias);
  at::Tensor dkey_factors = key_factors ? at::empty_like(*key_factors) : at::empty({0}, qkv.options());
  at::Tensor padded;
  Backward work{s, Map(qkv), Map(grad), Map(out), Map(dqkv), std::nullopt, statistics.data_ptr<float>()};
  if (s.height % window || s.width % window) {
    padded = at::empty({s.batch, 2 * heads * s.dim, s.rows * window, s.columns * window},
                       qkv.options().memory_format(at::MemoryFormat::ChannelsLast));
    work.padded = Map(padded);
  }
  const int64_t chunks = std::min(CHUNKS, s.windows), of_chunk = bias.numel() / heads;
  Floats parts(heads * chunks * of_chunk), key_parts(key_factors ? heads * chunks * of_chunk : 0);
  const Floats table = key_factors ? Floats(0) : reversed_table(bias, s);
  for_each_task(heads * chunks, [&] { return BackwardScratch(s); }, [&](int64_t task, BackwardScratch& scratch) {
    const int64_t head = task / chunks, chunk = task % chunks;
    const Factors factors(bias, key_factors, s, head);
    const Bias of_head{key_factors ? nullptr : table.data() + head * s.table, s.window, s.side};
    float* part = parts.data() + task * of_chunk;
    float* key_part = key_factors ? key_parts.data() + task * of_chunk : nullptr;
    if (key_factors)
      for (float* factor : {part, key_part}) std::memset(factor, 0, of_chunk * sizeof(float));
    else
      std::memset(scratch.dbias.data(), 0, s.side * s.window * s.vectors * V * sizeof(float));
    for (int64_t i = chunk * s.windows / chunks; i < (chunk + 1) * s.windows / chunks; ++i)
      work.window(Window(s, i), i, head, of_head, factors, scratch, key_factors ? part : nullptr, key_part);
    if (!key_factors) fold_bias(s, scratch.dbias.data(), part);
  });
  if (work.padded) fold_padding(s, *work.padded, work.dqkv);
  sum_chunks(parts.data(), heads, chunks, of_chunk, dbias.data_ptr<float>());
  if (key_factors) sum_chunks(key_parts.data(), heads, chunks, of_chunk, dkey_factors.data_ptr<float>());
  return {dqkv, dbias, dkey_factors};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def("cpu_window_attention(Tensor qkv, Tensor bias, Tensor? key_factors, int window, int heads) -> (Tensor, Tensor)");
  m.def(
      "cpu_window_attention_backward(Tensor grad, Tensor qkv, Tensor bias, Tensor? key_factors, Tensor out, "
      "Tensor statistics, int window, int heads) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("cpu_window_attention", window_attention);
  m.impl("cpu_window_attention_backward", window_attention_backward);
}
