// ConvAttn's two convolutions in one pass over tiles of the map: the large static one by overlap-save fast Fourier
// transforms, the small one of each image directly.
//
// The large kernel is even in both directions, so its transform is real and even. Three things follow:
//  - two real tiles can be transformed as one complex tile, one as real and one as imaginary part, and stay apart
//    through the product: no real-to-complex transform is needed;
//  - the frequencies (fy, fx), (-fy, fx), (fy, -fx) and (-fy, -fx) share one real matrix of C x C, so there are only
//    (Ny / 2 + 1)(Nx / 2 + 1) of them, and each is read once for eight rows (four frequencies, two parts);
//  - the gradient of the kernel, as far as an even kernel can follow it, needs only the real part of the correlation,
//    folded onto the same matrices: one inverse transform at the end, of K x K taps.
// Vectors run over channels, which lie innermost in every buffer.
//
// For conv_attn.cpp alone, which has the operators.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "pixels.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

// ------------------------------------------------------------------------------------------ transforms of a line

struct Complex {
  Vec re, im;
};
inline Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}
inline Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
inline Complex minus_i_times(Complex a) {
  return {a.im, -a.re};
}
inline Complex times(Complex a, float re, float im) {
  const Vec wr = broadcast(re), wi = broadcast(im);
  return {a.re * wr - a.im * wi, a.re * wi + a.im * wr};
}

template <int R>
[[gnu::always_inline]] inline void butterfly(Complex (&z)[R]);

template <>
[[gnu::always_inline]] inline void butterfly<3>(Complex (&z)[3]) {
  const Complex sum = z[1] + z[2], difference = minus_i_times(z[1] - z[2]);
  const Vec half = broadcast(0.5f), sine = broadcast(0.8660254037844386f);
  const Complex middle = {z[0].re - sum.re * half, z[0].im - sum.im * half};
  const Complex turned = {difference.re * sine, difference.im * sine};
  z[0] = z[0] + sum;
  z[1] = middle + turned;
  z[2] = middle - turned;
}

template <>
[[gnu::always_inline]] inline void butterfly<4>(Complex (&z)[4]) {
  const Complex a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = minus_i_times(z[1] - z[3]);
  z[0] = a + c;
  z[1] = b + d;
  z[2] = a - c;
  z[3] = b - d;
}

// Good and Thomas: 6 = 2 * 3 without factors between the two
template <>
[[gnu::always_inline]] inline void butterfly<6>(Complex (&z)[6]) {
  Complex even[3] = {z[0] + z[3], z[2] + z[5], z[4] + z[1]};
  Complex odd[3] = {z[0] - z[3], z[2] - z[5], z[4] - z[1]};
  butterfly<3>(even);
  butterfly<3>(odd);
  z[0] = even[0];
  z[4] = even[1];
  z[2] = even[2];
  z[3] = odd[0];
  z[1] = odd[1];
  z[5] = odd[2];
}

template <>
[[gnu::always_inline]] inline void butterfly<8>(Complex (&z)[8]) {
  Complex even[4] = {z[0], z[2], z[4], z[6]};
  Complex odd[4] = {z[1], z[3], z[5], z[7]};
  butterfly<4>(even);
  butterfly<4>(odd);
  const Vec root = broadcast(0.7071067811865476f);
  odd[1] = {(odd[1].re + odd[1].im) * root, (odd[1].im - odd[1].re) * root};
  odd[2] = minus_i_times(odd[2]);
  odd[3] = {(odd[3].im - odd[3].re) * root, (odd[3].re + odd[3].im) * -root};
  for (int k = 0; k < 4; ++k) {
    z[k] = even[k] + odd[k];
    z[k + 4] = even[k] - odd[k];
  }
}

template <int N1, int N2>
struct Twiddles {
  float re[N2][N1], im[N2][N1];
  Twiddles() {
    for (int n = 0; n < N2; ++n)
      for (int k = 0; k < N1; ++k) {
        const double angle = -2 * M_PI * n * k / (N1 * N2);
        re[n][k] = float(std::cos(angle));
        im[n][k] = float(std::sin(angle));
      }
  }
};

// The transform of N1 * N2 points (Cooley and Tukey); input and output may be the same. With real and imaginary parts
// exchanged on both sides it is the inverse transform, times N1 * N2.
template <int N1, int N2>
void transform(const float* re, const float* im, int64_t stride, float* out_re, float* out_im, int64_t out_stride) {
  static const Twiddles<N1, N2> twiddles;
  Complex between[N1][N2];
  for (int n = 0; n < N2; ++n) {
    Complex z[N1];
    for (int j = 0; j < N1; ++j) z[j] = {load(re + (N2 * j + n) * stride), load(im + (N2 * j + n) * stride)};
    butterfly<N1>(z);
    between[0][n] = z[0];
    for (int k = 1; k < N1; ++k) between[k][n] = times(z[k], twiddles.re[n][k], twiddles.im[n][k]);
  }
  for (int k = 0; k < N1; ++k) {
    Complex z[N2];
    for (int n = 0; n < N2; ++n) z[n] = between[k][n];
    butterfly<N2>(z);
    for (int j = 0; j < N2; ++j) {
      store(out_re + (k + N1 * j) * out_stride, z[j].re);
      store(out_im + (k + N1 * j) * out_stride, z[j].im);
    }
  }
}

using Transform = void (*)(const float*, const float*, int64_t, float*, float*, int64_t);

struct Length {
  int points;
  Transform transform;
};
const Length LENGTHS[] = {
    {16, transform<4, 4>}, {24, transform<6, 4>}, {32, transform<8, 4>}, {48, transform<6, 8>}, {64, transform<8, 8>}};

// ------------------------------------------------------------------------------------------------------- tiling

struct Tiling {
  int64_t batch, channels, height, width;
  int64_t blocks;  // of kLanes channels
  int64_t margin;  // of a tile's rim, which its outputs do not reach
  Length y, x;
  int64_t rows, columns;  // of tiles in an image

  int64_t valid_y() const { return y.points - 2 * margin; }
  int64_t valid_x() const { return x.points - 2 * margin; }
  int64_t tiles() const { return batch * rows * columns; }
  // Not of two images: one with huge numbers or none at all would spoil the other
  int64_t pairs_of_image() const { return (rows * columns + 1) / 2; }
  int64_t pairs() const { return batch * pairs_of_image(); }
  int64_t half_y() const { return y.points / 2 + 1; }
  int64_t half_x() const { return x.points / 2 + 1; }
  int64_t padded() const { return blocks * kLanes; }
  int64_t matrix() const { return channels * padded(); }
  // One more than the points of a row, lest a column fall on a few sets of the cache
  int64_t spectrum_row() const { return (x.points + 1) * 2 * kLanes; }
  int64_t spectrum_block() const { return y.points * spectrum_row(); }
  int64_t stage_row() const { return x.points * kLanes; }
  int64_t stage_block() const { return y.points * stage_row(); }
};

// (Whatever the number of threads, so that the results do not depend on it)
double cost_of(const Tiling& t) {
  const double points = double(t.y.points) * t.x.points;
  const double transforms = 5 * std::log2(points), products = 2.0 * t.channels;
  // (the kernel's own transform, of a quarter of the frequencies; and what does not fit into the cache comes slower)
  const double kernel = points / 4 * t.channels * (t.margin + 1);
  const double bytes = 4.0 * (t.half_y() * t.half_x() * t.matrix() + 2 * points * t.padded());
  return t.blocks * (t.pairs() * points * (transforms + products) * (bytes > 1e6 ? 1.3 : 1.0) + kernel);
}

Tiling choose_tiling(const Tensor& x, int64_t side, int64_t dynamic_side) {
  Tiling best{};
  double least = std::numeric_limits<double>::infinity();
  for (const Length& y : LENGTHS)
    for (const Length& columns : LENGTHS) {
      Tiling t{x.size(0), x.size(1), x.size(2), x.size(3), padded(x.size(1)) / kLanes, std::max(side, dynamic_side) / 2,
               y, columns, 0, 0};
      if (t.valid_y() < 1 || t.valid_x() < 1) continue;
      t.rows = (t.height + t.valid_y() - 1) / t.valid_y();
      t.columns = (t.width + t.valid_x() - 1) / t.valid_x();
      const double cost = cost_of(t);
      if (cost < least) {
        least = cost;
        best = t;
      }
    }
  require(std::isfinite(least), "conv_attention: a kernel of side ", std::max(side, dynamic_side),
  " is too large.");
  return best;
}

// A map of any strides
struct Map {
  float* data;
  int64_t batch, channel, row, column;

  explicit Map(const Tensor& tensor)
      : data(tensor.data()),
        batch(tensor.stride(0)),
        channel(tensor.stride(1)),
        row(tensor.stride(2)),
        column(tensor.stride(3)) {}

  float* at(int64_t image, int64_t y, int64_t x) const { return data + image * batch + y * row + x * column; }
};

struct Tile {
  bool exists;
  int64_t image, index;  // of all tiles
  int64_t top, left;     // of its outputs

  Tile(const Tiling& t, int64_t pair, int64_t part) : image(pair / t.pairs_of_image()) {
    const int64_t within = 2 * (pair % t.pairs_of_image()) + part;
    exists = within < t.rows * t.columns;
    index = image * t.rows * t.columns + within;
    top = within / t.columns * t.valid_y();
    left = within % t.columns * t.valid_x();
  }
};

struct Range {
  int64_t begin, end;
};

// The points of a line of a tile that lie within the map, less `rim` points at both ends
Range within(int64_t start, int64_t points, int64_t extent, int64_t rim) {
  const int64_t begin = std::clamp<int64_t>(-start, rim, points - rim);
  return {begin, std::clamp<int64_t>(extent - start, begin, points - rim)};
}

// Buffers that a thread keeps: getting megabytes from the system at each call costs as much as the computation
class Scratch {
 public:
  float* get(int64_t count) {
    const size_t wanted = size_t(count) + kLanes;
    if (memory_.size() < wanted) memory_.resize(wanted);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    const uintptr_t alignment = sizeof(Vec);
    return reinterpret_cast<float*>((address + alignment - 1) / alignment * alignment);
  }

 private:
  std::vector<float> memory_;
};

// --------------------------------------------------------------------------------- the steps of a pair of tiles

// Pixels of a row into [x][kLanes], channels beyond the last one as zeros
void stage_row(const Tiling& t, const Map& map, const float* from, int64_t block, Range x, float* to) {
  const int64_t lanes = std::min<int64_t>(kLanes, t.channels - block * kLanes);
  from += block * kLanes * map.channel;
  if (map.channel == 1 && lanes == kLanes) {
    for (int64_t i = x.begin; i < x.end; ++i) store(to + i * kLanes, load(from + i * map.column));
    return;
  }
  if (lanes < kLanes) std::memset(to + x.begin * kLanes, 0, (x.end - x.begin) * sizeof(Vec));
  if (map.channel == 1) {
    for (int64_t i = x.begin; i < x.end; ++i)
      std::memcpy(to + i * kLanes, from + i * map.column, lanes * sizeof(float));
    return;
  }
  for (int64_t c = 0; c < lanes; ++c)
    for (int64_t i = x.begin; i < x.end; ++i) to[i * kLanes + c] = from[c * map.channel + i * map.column];
}

// A tile with its rim into [block][y][x][kLanes], zeros outside the map and, where asked for, in the rim.
// Returns the rows that are not zero.
Range stage_tile(const Tiling& t, const Map& map, const Tile& tile, bool with_rim, float* to) {
  if (!tile.exists) {
    std::memset(to, 0, t.blocks * t.stage_block() * sizeof(float));
    return {0, 0};
  }
  const int64_t top = tile.top - t.margin, left = tile.left - t.margin, rim = with_rim ? 0 : t.margin;
  const Range rows = within(top, t.y.points, t.height, rim), columns = within(left, t.x.points, t.width, rim);
  for (int64_t block = 0; block < t.blocks; ++block)
    for (int64_t y = 0; y < t.y.points; ++y) {
      float* row = to + block * t.stage_block() + y * t.stage_row();
      if (y < rows.begin || y >= rows.end) {
        std::memset(row, 0, t.stage_row() * sizeof(float));
        continue;
      }
      std::memset(row, 0, columns.begin * sizeof(Vec));
      std::memset(row + columns.end * kLanes, 0, (t.x.points - columns.end) * sizeof(Vec));
      stage_row(t, map, map.data + tile.image * map.batch + (top + y) * map.row + left * map.column, block, columns,
          row);
    }
  return rows;
}

// Two staged tiles, as real and imaginary part, into [block][y][fx][part][kLanes]
void transform_rows(const Tiling& t, const float* real, const float* imaginary, Range rows, float* spectrum) {
  for (int64_t block = 0; block < t.blocks; ++block)
    for (int64_t y = 0; y < t.y.points; ++y) {
      float* row = spectrum + block * t.spectrum_block() + y * t.spectrum_row();
      const int64_t at = block * t.stage_block() + y * t.stage_row();
      if (y < rows.begin || y >= rows.end)
        std::memset(row, 0, t.spectrum_row() * sizeof(float));
      else
        t.x.transform(real + at, imaginary + at, kLanes, row, row + kLanes, 2 * kLanes);
    }
}

void transform_column(const Tiling& t, float* spectrum, int64_t x, bool inverse) {
  for (int64_t block = 0; block < t.blocks; ++block) {
    float* real = spectrum + block * t.spectrum_block() + x * 2 * kLanes;
    float* imaginary = real + kLanes;
    if (inverse) std::swap(real, imaginary);
    t.y.transform(real, imaginary, t.spectrum_row(), real, imaginary, t.spectrum_row());
  }
}

// The frequencies that share a matrix: offsets of one, two or four of them within a block of a spectrum
struct Group {
  int64_t offsets[4];
  int count;

  Group(const Tiling& t, int64_t fy, int64_t fx) : count(0) {
    const int64_t mirrored_y = (t.y.points - fy) % t.y.points, mirrored_x = (t.x.points - fx) % t.x.points;
    for (int64_t y : {fy, mirrored_y}) {
      for (int64_t x : {fx, mirrored_x}) {
        offsets[count++] = y * t.spectrum_row() + x * 2 * kLanes;
        if (mirrored_x == fx) break;
      }
      if (mirrored_y == fy) break;
    }
  }
};

// The rows of a group (two parts of each frequency): [block][row][kLanes]
template <int COUNT>
void gather(const Tiling& t, const float* spectrum, const Group& group, float* rows) {
  for (int64_t block = 0; block < t.blocks; ++block)
    for (int i = 0; i < COUNT; ++i)
      for (int part = 0; part < 2; ++part)
        store(rows + ((block * COUNT + i) * 2 + part) * kLanes,
              load(spectrum + block * t.spectrum_block() + group.offsets[i] + part * kLanes));
}

template <int COUNT>
void multiply_group(const Tiling& t, const float* rows, const float* matrix, const Group& group, float* spectrum) {
  const int64_t padded = t.padded();
  for (int64_t block = 0; block < t.blocks; ++block) {
    Vec sums[2 * COUNT] = {};
    const float* weights = matrix + block * kLanes;
    for (int64_t from = 0; from < t.channels; from += kLanes, rows += 2 * COUNT * kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, t.channels - from);
      for (int64_t k = 0; k < lanes; ++k, weights += padded) {
        const Vec weight = load(weights);
        for (int r = 0; r < 2 * COUNT; ++r) sums[r] += broadcast(rows[r * kLanes + k]) * weight;
      }
    }
    rows -= t.blocks * 2 * COUNT * kLanes;
    for (int r = 0; r < 2 * COUNT; ++r)
      store(spectrum + block * t.spectrum_block() + group.offsets[r / 2] + r % 2 * kLanes, sums[r]);
  }
}

// sums[input channel][output channel] += what the rows of both have in common
template <int COUNT>
void correlate_group(const Tiling& t, const float* inputs, const float* outputs, float* sums) {
  const int64_t padded = t.padded();
  for (int64_t block = 0; block < t.blocks; ++block) {
    Vec right[2 * COUNT];
    for (int r = 0; r < 2 * COUNT; ++r) right[r] = load(outputs + (block * 2 * COUNT + r) * kLanes);
    for (int64_t k = 0; k < t.channels; ++k) {
      const float* left = inputs + k / kLanes * 2 * COUNT * kLanes + k % kLanes;
      float* at = sums + k * padded + block * kLanes;
      Vec sum = load(at);
      for (int r = 0; r < 2 * COUNT; ++r) sum += broadcast(left[r * kLanes]) * right[r];
      store(at, sum);
    }
  }
}

// For every matrix: multiply `spectrum` by it, after correlating `inputs` with it; either may be left out (null)
template <int COUNT>
void visit_group(const Tiling& t, const Group& group, float* spectrum, const float* matrix, const float* inputs,
                 float* sums, float* rows) {
  gather<COUNT>(t, spectrum, group, rows);
  if (inputs != nullptr) {
    float* other = rows + 2 * COUNT * t.padded();
    gather<COUNT>(t, inputs, group, other);
    correlate_group<COUNT>(t, other, rows, sums);
  }
  if (matrix != nullptr) multiply_group<COUNT>(t, rows, matrix, group, spectrum);
}

// The same for all matrices, from spectra whose rows alone are transformed to a product of the same kind: two mirrored
// columns are transformed, multiplied and transformed back while they are in the first cache.
void visit_frequencies(const Tiling& t, float* spectrum, const float* matrices, float* inputs, float* sums,
                       float* rows) {
  for (int64_t fx = 0; fx < t.half_x(); ++fx) {
    const int64_t mirrored = (t.x.points - fx) % t.x.points;
    const auto transform_both = [&](float* of, bool inverse) {
      transform_column(t, of, fx, inverse);
      if (mirrored != fx) transform_column(t, of, mirrored, inverse);
    };
    transform_both(spectrum, false);
    if (inputs != nullptr) transform_both(inputs, false);
    for (int64_t fy = 0; fy < t.half_y(); ++fy) {
      const int64_t at = (fx * t.half_y() + fy) * t.matrix();
      const Group group(t, fy, fx);
      const auto visit = group.count == 4 ? visit_group<4> : group.count == 2 ? visit_group<2> : visit_group<1>;
      visit(t, group, spectrum, matrices ? matrices + at : nullptr, inputs, sums ? sums + at : nullptr, rows);
    }
    if (matrices != nullptr) transform_both(spectrum, true);
  }
}

// The small kernel [tap][padded channels] around each pixel of a staged row, added to `line`, into pixels `step` apart
void add_dynamic(const Tiling& t, const float* staged, const float* taps, int64_t side, Range x, const float* line,
                 float* out, int64_t step) {
  const int64_t reach = side / 2, padded = t.padded();
  if (side == 3) {
    Vec w[9];
    for (int i = 0; i < 9; ++i) w[i] = load(taps + i * padded);
    const float *above = staged - t.stage_row(), *below = staged + t.stage_row();
    for (int64_t i = x.begin; i < x.end; ++i) {
      Vec sum = load(line + i * kLanes);
      for (int d = 0; d < 3; ++d) {
        const int64_t at = (i + d - 1) * kLanes;
        sum += w[d] * load(above + at) + w[3 + d] * load(staged + at) + w[6 + d] * load(below + at);
      }
      store(out + (i - x.begin) * step, sum);
    }
    return;
  }
  for (int64_t i = x.begin; i < x.end; ++i) {
    Vec sum = load(line + i * kLanes);
    for (int64_t a = 0; a < side; ++a)
      for (int64_t b = 0; b < side; ++b)
        sum += load(taps + (a * side + b) * padded) *
               load(staged + (a - reach) * t.stage_row() + (i + b - reach) * kLanes);
    store(out + (i - x.begin) * step, sum);
  }
}

void write_row(const Tiling& t, const Map& map, float* to, int64_t block, int64_t pixels, const float* from) {
  const int64_t lanes = std::min<int64_t>(kLanes, t.channels - block * kLanes);
  to += block * kLanes * map.channel;
  if (map.channel == 1) {
    for (int64_t i = 0; i < pixels; ++i) store_channels(to + i * map.column, 0, lanes, load(from + i * kLanes));
  } else {
    for (int64_t c = 0; c < lanes; ++c)
      for (int64_t i = 0; i < pixels; ++i) to[c * map.channel + i * map.column] = from[i * kLanes + c];
  }
}

// What a 1 x 1 convolution makes of the convolved channels and of the others of a map whose channels are innermost,
// the map that is added to it, if any, and where the convolved channels are kept for later gradients, if they are
struct Mixer {
  Map in, added, out;
  bool adds;
  std::optional<Map> kept;
  int64_t inputs, outputs;
  std::vector<float> weights;  // [input][padded output]
  std::vector<float> bias;     // [padded output]

  Mixer(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& to, const Tensor& weight,
        const std::optional<Tensor>& offset, const Tensor* convolved)
      : in(x),
        added(residual ? *residual : x),
        out(to),
        adds(residual.has_value()),
        inputs(x.size(1)),
        outputs(to.size(1)),
        weights(inputs * padded(outputs)),
        bias(padded(outputs)) {
    if (convolved) kept.emplace(*convolved);
    const Map from(weight);
    for (int64_t o = 0; o < outputs; ++o) {
      if (offset) bias[o] = offset->data()[o * offset->stride(0)];
      for (int64_t i = 0; i < inputs; ++i)
        weights[i * padded(outputs) + o] = from.data[o * from.batch + i * from.channel];
    }
  }
  // Of a pixel in the buffer of a row, whose last vector may reach over its end
  int64_t step() const { return padded(inputs); }
};

// The channels from `first` on of some pixels, copied
void copy_passed(const Mixer& mixer, int64_t first, int64_t pixels, const float* from, float* to) {
  for (int64_t i = 0; i < pixels; ++i, from += mixer.in.column, to += mixer.step()) {
    int64_t c = first;
    for (; c + kLanes <= mixer.inputs; c += kLanes) store(to + c, load(from + c));
    if (c < mixer.inputs) store_first(to + c, load_first(from + c, mixer.inputs - c), mixer.inputs - c);
  }
}

// The first channels of some pixels, copied to a map of their own
void keep_convolved(const Mixer& mixer, int64_t channels, int64_t pixels, const float* from, float* to) {
  for (int64_t i = 0; i < pixels; ++i, from += mixer.step(), to += mixer.kept->column)
    for (int64_t c = 0; c < channels; c += kLanes)
      store_count(to + c, load(from + c), std::min(kLanes, channels - c));
}

// VECTORS * kLanes outputs from `first` on, of PIXELS neighbours. (A function of its own, lest the sums be spilled.)
template <int PIXELS, int VECTORS, bool WHOLE>
[[gnu::noinline]] void mix_pixels(const Mixer& mixer, int64_t first, const float* from, const float* added, float* to) {
  const int64_t inputs = mixer.inputs, step = mixer.step(), padded_outputs = padded(mixer.outputs);
  const float* weights = mixer.weights.data() + first;
  Vec sums[PIXELS][VECTORS];
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[p][v] = load(mixer.bias.data() + first + v * kLanes);
  for (int64_t c = 0; c < inputs; ++c, weights += padded_outputs) {
    Vec columns[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) columns[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p) {
      const Vec value = broadcast(from[p * step + c]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[p][v] += value * columns[v];
    }
  }
  const int64_t added_step = mixer.added.column, out_step = mixer.out.column;
  const bool adds = mixer.adds;
  added += first;
  to += first;
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const float* other = added + p * added_step + v * kLanes;
      float* at = to + p * out_step + v * kLanes;
      // (Nothing of a length that is not known yet beside whole vectors: its calls would have the sums spilled)
      if constexpr (WHOLE) {
        if (adds) sums[p][v] += load(other);
        store(at, sums[p][v]);
      } else {
        if (adds) sums[p][v] += load_first(other, mixer.outputs - first);
        store_first(at, sums[p][v], mixer.outputs - first);
      }
    }
}

// All outputs of the pixels of a row
void mix_row(const Mixer& mixer, int64_t pixels, const float* from, const float* added, float* to) {
  constexpr int MANY = 6, VECTORS = kTileColumns == 2 ? 2 : 4;
  const auto mix = [&](auto function, int64_t i, int64_t first) {
    function(mixer, first, from + i * mixer.step(), added + i * mixer.added.column, to + i * mixer.out.column);
  };
  const auto run = [&]<int V, bool WHOLE>(std::integral_constant<int, V>, std::bool_constant<WHOLE>, int64_t first) {
    // The last ones may be computed twice
    for (int64_t i = 0; i < pixels && pixels >= MANY; i += MANY)
      mix(mix_pixels<MANY, V, WHOLE>, std::min<int64_t>(i, pixels - MANY), first);
    for (int64_t i = 0; i < pixels && pixels < MANY; ++i) mix(mix_pixels<1, V, WHOLE>, i, first);
  };
  const int64_t whole = mixer.outputs / kLanes * kLanes;
  int64_t first = 0;
  for (; first + VECTORS * kLanes <= whole; first += VECTORS * kLanes)
    run(std::integral_constant<int, VECTORS>{}, std::true_type{}, first);
  for (; first < whole; first += kLanes) run(std::integral_constant<int, 1>{}, std::true_type{}, first);
  if (first < mixer.outputs) run(std::integral_constant<int, 1>{}, std::false_type{}, first);
}

// Back from a product's spectrum, of which the rows alone are transformed still, to the outputs of two tiles, the small
// convolution of the staged tiles added; into `out`, or through `mixer` where there is one
void from_spectrum(const Tiling& t, const float* spectrum, const Tile (&tiles)[2], const float* const (&staged)[2],
                   const float* taps, int64_t side, const Map& out, const Mixer* mixer, float* lines, float* row) {
  for (int64_t y = t.margin; y < t.y.points - t.margin; ++y) {
    const auto is_output = [&](const Tile& tile) { return tile.exists && tile.top + y - t.margin < t.height; };
    if (!is_output(tiles[0]) && !is_output(tiles[1])) continue;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const float* from = spectrum + block * t.spectrum_block() + y * t.spectrum_row();
      float *real = lines + 2 * block * t.stage_row(), *imaginary = real + t.stage_row();
      t.x.transform(from + kLanes, from, 2 * kLanes, imaginary, real, kLanes);
    }
    for (int i = 0; i < 2; ++i) {
      const Tile& tile = tiles[i];
      if (!is_output(tile)) continue;
      const int64_t target = tile.top + y - t.margin;
      const Range x = within(tile.left - t.margin, t.x.points, t.width, t.margin);
      const int64_t pixels = x.end - x.begin;
      for (int64_t block = 0; block < t.blocks; ++block) {
        float* line = lines + (2 * block + i) * t.stage_row();
        float* to = mixer ? row + block * kLanes : line + x.begin * kLanes;
        add_dynamic(t, staged[i] + block * t.stage_block() + y * t.stage_row(),
                    taps + tile.image * side * side * t.padded() + block * kLanes, side, x, line, to,
                    mixer ? mixer->step() : kLanes);
        if (!mixer) write_row(t, out, out.at(tile.image, target, tile.left), block, pixels, to);
      }
      if (!mixer) continue;
      if (mixer->kept) keep_convolved(*mixer, t.channels, pixels, row, mixer->kept->at(tile.image, target, tile.left));
      copy_passed(*mixer, t.channels, pixels, mixer->in.at(tile.image, target, tile.left), row);
      mix_row(*mixer, pixels, row, mixer->added.at(tile.image, target, tile.left),
              mixer->out.at(tile.image, target, tile.left));
    }
  }
}

// The gradient of the small kernel from one tile: [tap][padded channels], from inputs without and gradients with rim
void correlate_dynamic(const Tiling& t, const float* inputs, const float* gradients, int64_t side, Range rows,
    float* to) {
  const int64_t reach = side / 2, padded = t.padded();
  std::memset(to, 0, side * side * padded * sizeof(float));
  for (int64_t block = 0; block < t.blocks; ++block)
    for (int64_t y = rows.begin; y < rows.end; ++y)
      for (int64_t a = 0; a < side; ++a) {
        const float* in = inputs + block * t.stage_block() + y * t.stage_row();
        const float* gradient = gradients + block * t.stage_block() + (y - a + reach) * t.stage_row();
        for (int64_t b = 0; b < side; ++b) {
          Vec sums[4] = {};
          int64_t i = t.margin;
          const int64_t end = t.x.points - t.margin;
          for (; i + 4 <= end; i += 4)
            for (int j = 0; j < 4; ++j) sums[j] += load(in + (i + j) * kLanes) * load(gradient + (i + j - b + reach)
                * kLanes);
          for (; i < end; ++i) sums[0] += load(in + i * kLanes) * load(gradient + (i - b + reach) * kLanes);
          float* at = to + (a * side + b) * padded + block * kLanes;
          store(at, load(at) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
        }
      }
}

// ---------------------------------------------------------------------------------------------------- the kernels

// cos(2 pi f d / N), [f][d]
std::vector<float> cosines(int64_t points, int64_t taps) {
  std::vector<float> table((points / 2 + 1) * taps);
  for (int64_t f = 0; f <= points / 2; ++f)
    for (int64_t d = 0; d < taps; ++d) table[f * taps + d] = float(std::cos(2 * M_PI * double(f * d % points)
        / points));
  return table;
}

// The matrices [fx][fy][input channel][padded output channel] of an even kernel (output, input, K, K) of any strides,
// divided by the points of a tile, which the inverse transform leaves as a factor.
void kernel_matrices(const Tiling& t, const Tensor& kernel, float* matrices) {
  const int64_t side = kernel.size(2), reach = side / 2, taps = reach + 1;
  const Map map(kernel);
  const auto cos_y = cosines(t.y.points, taps), cos_x = cosines(t.x.points, taps);
  std::atomic<bool> even{true};
  parallel_for(0, t.channels * t.blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(taps * (taps + t.half_x()) * kLanes);
    float *folded = memory.data(), *half = folded + taps * taps * kLanes;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t input = job / t.blocks, block = job % t.blocks;
      std::fill(memory.begin(), memory.end(), 0.f);
      const int64_t lanes = std::min<int64_t>(kLanes, t.channels - block * kLanes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float* at = map.data + (block * kLanes + lane) * map.batch + input * map.channel;
        for (int64_t a = 0; a < taps; ++a)
          for (int64_t b = 0; b < taps; ++b) {
            const auto tap = [&](int64_t y, int64_t x) { return at[(reach + y) * map.row + (reach + x) * map.column]; };
            const float value = tap(a, b), others[3] = {tap(-a, b), tap(a, -b), tap(-a, -b)};
            for (float other : others)
              // Weights that have all become infinite or no numbers are for the training to report
              if (!(std::abs(value - other) <= 1e-5f * std::abs(value) + 1e-12f || value == other ||
                    (std::isnan(value) && std::isnan(other))))
                even = false;
            const float weight = (a ? 2.f : 1.f) * (b ? 2.f : 1.f) / float(t.y.points * t.x.points);
            folded[(a * taps + b) * kLanes + lane] = weight * value;
          }
      }
      for (int64_t a = 0; a < taps; ++a)
        for (int64_t fx = 0; fx < t.half_x(); ++fx) {
          Vec sum = {};
          for (int64_t b = 0; b < taps; ++b)
            sum += broadcast(cos_x[fx * taps + b]) * load(folded + (a * taps + b) * kLanes);
          store(half + (a * t.half_x() + fx) * kLanes, sum);
        }
      for (int64_t fy = 0; fy < t.half_y(); ++fy)
        for (int64_t fx = 0; fx < t.half_x(); ++fx) {
          Vec sum = {};
          for (int64_t a = 0; a < taps; ++a) sum += broadcast(cos_y[fy * taps + a]) * load(half + (a * t.half_x() + fx)
              * kLanes);
          store(matrices + (fx * t.half_y() + fy) * t.matrix() + input * t.padded() + block * kLanes, sum);
        }
    }
  });
  require(even, "conv_attention: large_kernel is not symmetric, that is, equal to its mirror images in both "
                "directions. Pass it through symmetrise, or call with symmetric=False.");
}

// The gradient (output, input, K, K) from correlations [share][fx][fy][input channel][padded output channel]
void kernel_gradient(const Tiling& t, const float* sums, int64_t shares, Tensor& gradient) {
  const int64_t side = gradient.size(2), reach = side / 2, taps = reach + 1;
  const Map map(gradient);
  const auto cos_y = cosines(t.y.points, taps), cos_x = cosines(t.x.points, taps);
  const Vec scale = broadcast(1.f / float(t.y.points * t.x.points));
  const int64_t share_size = t.half_y() * t.half_x() * t.matrix();
  parallel_for(0, t.channels * t.blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(taps * (taps + t.half_x()) * kLanes);
    float *spatial = memory.data(), *half = spatial + taps * taps * kLanes;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t input = job / t.blocks, block = job % t.blocks;
      std::fill(memory.begin(), memory.end(), 0.f);
      for (int64_t fy = 0; fy < t.half_y(); ++fy)
        for (int64_t fx = 0; fx < t.half_x(); ++fx) {
          const float* at = sums + (fx * t.half_y() + fy) * t.matrix() + input * t.padded() + block * kLanes;
          Vec sum = load(at);
          for (int64_t share = 1; share < shares; ++share) sum += load(at + share * share_size);
          for (int64_t a = 0; a < taps; ++a) {
            float* to = half + (a * t.half_x() + fx) * kLanes;
            store(to, load(to) + broadcast(cos_y[fy * taps + a]) * sum);
          }
        }
      for (int64_t a = 0; a < taps; ++a)
        for (int64_t b = 0; b < taps; ++b) {
          Vec sum = {};
          for (int64_t fx = 0; fx < t.half_x(); ++fx)
            sum += broadcast(cos_x[fx * taps + b]) * load(half + (a * t.half_x() + fx) * kLanes);
          store(spatial + (a * taps + b) * kLanes, sum * scale);
        }
      const int64_t lanes = std::min<int64_t>(kLanes, t.channels - block * kLanes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* at = map.data + (block * kLanes + lane) * map.batch + input * map.channel;
        for (int64_t y = 0; y < side; ++y)
          for (int64_t x = 0; x < side; ++x)
            at[y * map.row + x * map.column] = spatial[(std::abs(y - reach) * taps + std::abs(x - reach)) * kLanes
                + lane];
      }
    }
  });
}

// (B, C, k, k) -> [image][tap][padded channels], for the gradient turned by 180 degrees
std::vector<float> arranged_taps(const Tiling& t, const Tensor& kernel, bool turned) {
  const int64_t side = kernel.size(2), count = side * side;
  const Map map(kernel);
  std::vector<float> taps(t.batch * count * t.padded());
  for (int64_t image = 0; image < t.batch; ++image)
    for (int64_t tap = 0; tap < count; ++tap)
      for (int64_t c = 0; c < t.channels; ++c) {
        const int64_t source = turned ? count - 1 - tap : tap;
        taps[(image * count + tap) * t.padded() + c] =
            map.data[image * map.batch + c * map.channel + source / side * map.row + source % side * map.column];
      }
  return taps;
}

}  // namespace
}  // namespace esc_arch
