// ConvFFN in one pass, forward and backward: aggr(gelu(dwc(h)) + h) with h = gelu(proj(x)). For inference x may be
// normalised, and the result averaged, in the same pass.
//
// Maps are channels_last. Hidden rows exist only in a buffer that stays in the cache: a thread walks down its rows of
// an image, in bands of columns, and keeps the few rows that the 3 x 3 convolution needs. Backward computes them again.
// Hidden channels are padded to whole vectors by zero weights, which keeps zeros zero through every step.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "matrices.h"
#include "memory.h"
#include "pixels.h"
#include "products.h"
#include "tensors.h"
#include "vectors.h"

namespace esc_arch {
namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kCacheBudget = 512 * 1024;  // bytes of a thread's rolling rows: well inside a core's L2
constexpr int64_t kPiece = 120;                // pixels between two uses of a weight, so that it stays in L1

// --- weights, sizes and who does what -------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, height, width, channels, hidden;
  int64_t padded_hidden, hidden_vectors, channel_vectors, padded_channels;

  Sizes(const Tensor& x, const Tensor& proj_weight)
      : batch(x.size(0)), height(x.size(2)), width(x.size(3)), channels(x.size(1)), hidden(proj_weight.size(0)),
        padded_hidden(padded(hidden)), hidden_vectors(padded_hidden / kLanes),
        channel_vectors(padded(channels) / kLanes), padded_channels(padded(channels)) {}
};

struct Weights {
  Floats expand, expand_bias, taps, taps_bias, reduce, reduce_bias;

  Weights(const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& dwc_weight,
          const Tensor& dwc_bias, const Tensor& aggr_weight, const Tensor& aggr_bias)
      : expand(packed(as_matrix(proj_weight).transpose(0, 1))), expand_bias(packed(as_row(proj_bias))),
        taps(packed(as_matrix(dwc_weight).transpose(0, 1))), taps_bias(packed(as_row(dwc_bias))),
        reduce(packed(as_matrix(aggr_weight).transpose(0, 1))), reduce_bias(packed(as_row(aggr_bias))) {}
};

// Columns of a band such that `rows` rolling hidden rows of it stay in the cache.
int64_t band_width(const Sizes& s, int64_t rows, int64_t margin) {
  const int64_t fitting = kCacheBudget / (rows * s.padded_hidden * static_cast<int64_t>(sizeof(float))) - 2 * margin;
  const int64_t most = std::max<int64_t>(fitting, 16), bands = (s.width + most - 1) / most;
  return (s.width + bands - 1) / bands;
}

struct Segment {
  int64_t image, left, right, top, bottom;
};

// Cut all rows of all bands and images into `parts` equal parts, and call work(segment) for those of `part`.
template <typename Work>
void for_segments(const Sizes& s, int64_t width, int64_t part, int64_t parts, Work work) {
  const int64_t bands = (s.width + width - 1) / width;
  const int64_t total = s.batch * bands * s.height;
  const int64_t end = total * (part + 1) / parts;
  for (int64_t row = total * part / parts; row < end;) {
    const int64_t strip = row / s.height, top = row % s.height;
    const int64_t bottom = std::min(s.height, top + end - row);
    const int64_t left = strip % bands * width;
    work(Segment{strip / bands, left, std::min(s.width, left + width), top, bottom});
    row += bottom - top;
  }
}

// As many parts as threads, but none so small that its margins cost more than it does.
int64_t number_of_parts(const Sizes& s, int64_t width) {
  const int64_t rows = s.batch * ((s.width + width - 1) / width) * s.height;
  return std::clamp<int64_t>(rows / 4, 1, get_num_threads());
}

// Rows of hidden pixels, a few at a time, of the columns from `first` on: all columns of the first vector of channels,
// then those of the next, because the depth-wise convolution goes along the columns.
struct RollingRows {
  int64_t rows, plane, vectors, first;
  Floats data;

  RollingRows(int64_t rows, int64_t columns, int64_t vectors)
      : rows(rows), plane(columns * kLanes), vectors(vectors), first(0), data(rows * vectors * plane) {}

  // Where column 0 of the image would be: vector v of a column is at v * plane + column * kLanes from here.
  float* row(int64_t index) {
    return data.data() + (index + rows) % rows * vectors * plane - first * kLanes;
  }
};

struct Span {
  int64_t from, to;
};

// The columns of left .. right that are in the image, none in a row outside; the others are made zero in `hidden`.
Span inside(const Sizes& s, RollingRows& hidden, int64_t row, int64_t left, int64_t right) {
  const bool outside = row < 0 || row >= s.height;
  const Span span = outside ? Span{right, right} : Span{std::max<int64_t>(left, 0), std::min(right, s.width)};
  float* target = hidden.row(row);
  for (int64_t v = 0; v < hidden.vectors; ++v, target += hidden.plane) {
    std::fill(target + left * kLanes, target + span.from * kLanes, 0.0f);
    std::fill(target + span.to * kLanes, target + right * kLanes, 0.0f);
  }
  return span;
}

// A row of a map as it is; called with a column and a number of pixels, says where these are.
struct Row {
  const float* data;
  int64_t channels;

  ESC_ARCH_INLINE const float* operator()(int64_t column, int64_t) const {
    return data + column * channels;
  }
};

// A pointwise product for the columns of a span; use(place of the vector in a rolling row, sums).
template <typename Source, typename Use>
ESC_ARCH_INLINE void hidden_product(const Sizes& s, const Source& row, const Floats& weight, const float* bias,
                                    Span span, int64_t plane, Use use) {
  for (int64_t begin = span.from; begin < span.to; begin += kPiece) {
    const int64_t pixels = std::min(kPiece, span.to - begin);
    product(pixels, s.hidden_vectors, s.channels, {row(begin, pixels), s.channels, 1}, weight.data(), s.padded_hidden,
            bias, [=](int64_t m, int64_t v, Vec sum) { use(v * plane + (begin + m) * kLanes, sum); });
  }
}

// hidden (pixels, hidden) times a weight of rows of padded channels -> pixels of a map.
void channel_product(const Sizes& s, int64_t pixels, const float* hidden, const Floats& weight,
                     const float* bias, float* map) {
  const int64_t channels = s.channels;
  product(pixels, s.channel_vectors, s.hidden, {hidden, s.padded_hidden, 1}, weight.data(), s.padded_channels, bias,
          [=](int64_t m, int64_t v, Vec sum) { store_channels(map + m * channels, v, channels, sum); });
}

// --- forward --------------------------------------------------------------------------------------------------------

// The three rows around one that the depth-wise convolution reads.
struct Around {
  const float *above, *here, *below;
  int64_t plane;

  Around(RollingRows& rows, int64_t row)
      : above(rows.row(row - 1)), here(rows.row(row)), below(rows.row(row + 1)), plane(rows.plane) {}
};

// The depth-wise convolution of one vector of channels: its weights, and where its rows are.
struct Filter {
  Vec taps[kTaps], bias;
  const float* rows[3];

  ESC_ARCH_INLINE Filter(const Weights& w, int64_t step, const Around& around, int64_t v)
      : bias(load(w.taps_bias.data() + v * kLanes)) {
#pragma GCC unroll 9
    for (int64_t t = 0; t < kTaps; ++t) taps[t] = load(w.taps.data() + t * step + v * kLanes);
    const int64_t place = v * around.plane;
    rows[0] = around.above + place;
    rows[1] = around.here + place;
    rows[2] = around.below + place;
  }

  // At `count` neighbouring columns, which share what they load.
  template <int64_t count, typename Use>
  ESC_ARCH_INLINE void apply(int64_t column, Use use) const {
    Vec sums[count], centres[count];
#pragma GCC unroll 8
    for (int64_t c = 0; c < count; ++c) sums[c] = bias;
#pragma GCC unroll 3
    for (int64_t r = 0; r < 3; ++r) {
#pragma GCC unroll 8
      for (int64_t from = 0; from < count + 2; ++from) {
        const Vec value = load(rows[r] + (column + from - 1) * kLanes);
        if (r == 1 && from > 0 && from <= count) centres[from - 1] = value;
#pragma GCC unroll 3
        for (int64_t t = 0; t < 3; ++t) {
          const int64_t c = from - t;
          if (c >= 0 && c < count) sums[c] += taps[3 * r + t] * value;
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t c = 0; c < count; ++c) use(column + c, sums[c], centres[c]);
  }
};

constexpr int64_t kColumns = 4;  // of the depth-wise convolution, kept in registers together

// The depth-wise convolution at the columns of a span in vector v; use(column, sums, hidden at the centre).
template <typename Use>
ESC_ARCH_INLINE void filter(const Weights& w, int64_t step, const Around& rows, Span span, int64_t v, Use use) {
  const Filter filter(w, step, rows, v);
  int64_t column = span.from;
  for (; column + kColumns <= span.to; column += kColumns) filter.apply<kColumns>(column, use);
  for (; column < span.to; ++column) filter.apply<1>(column, use);
}

// A normalisation over the channels before everything; there is none where weight is null.
struct Norm {
  const float *weight, *bias;
  float eps;
};

// A row of a map whose pixels are normalised into a buffer when they are asked for.
struct NormalRow {
  const float* data;
  int64_t channels;
  const Norm& norm;
  Floats& buffer;

  ESC_ARCH_INLINE const float* operator()(int64_t column, int64_t pixels) const {
    float* to = buffer.data();
    const int64_t step = channels;
    normalise(pixels, channels, data + column * channels, norm.weight, norm.bias, norm.eps,
              [=](int64_t p, int64_t c, int64_t count, Vec value) { store_count(to + p * step + c, value, count); });
    return to;
  }
};

// The sums of the first channels of a result, for each row of each band: (images x bands, rows, padded channels). Which
// thread had a row makes no difference.
struct RowSums {
  int64_t pooled, bands, width, height, step;
  Floats data;

  RowSums(const Sizes& s, int64_t width, int64_t pooled)
      : pooled(pooled), bands((s.width + width - 1) / width), width(width), height(s.height), step(padded(pooled)),
        data(s.batch * bands * height * step) {}

  void add(const Segment& part, int64_t row, int64_t pixels, int64_t channels, const float* map) {
    float* sums = data.data() + ((part.image * bands + part.left / width) * height + row) * step;
    for (int64_t c = 0; c < pooled; c += kLanes) {
      const Vec sum = sum_of_pixels(map + c, pixels, channels, std::min(kLanes, channels - c));
      store(sums + c, load(sums + c) + sum);
    }
  }

  // (images, pooled channels)
  Tensor means(const Sizes& s) const {
    Tensor result = empty({s.batch, pooled});
    float* to = result.data();
    for (int64_t image = 0; image < s.batch; ++image) {
      const float* sums = data.data() + image * bands * height * step;
      for (int64_t c = 0; c < pooled; ++c) {
        double total = 0;
        for (int64_t row = 0; row < bands * height; ++row) total += sums[row * step + c];
        *to++ = static_cast<float>(total / (s.height * s.width));
      }
    }
    return result;
  }
};

// What a thread keeps while it walks down.
struct ForwardScratch {
  RollingRows hidden;
  Floats normal, mixed;

  ForwardScratch(const Sizes& s, int64_t width, bool normalised)
      : hidden(3, width + 2, s.hidden_vectors), normal(normalised ? kPiece * s.channels : 0),
        mixed(kPiece * s.padded_hidden) {}
};

void forward_segment(const Sizes& s, const Weights& w, const Norm& norm, const float* x, float* y, RowSums& row_sums,
                     const Segment& part, ForwardScratch& scratch) {
  const int64_t row_size = s.width * s.channels, step = s.padded_hidden;
  RollingRows& hidden = scratch.hidden;
  hidden.first = part.left - 1;
  for (int64_t row = part.top - 1; row <= part.bottom; ++row) {
    const Span columns = inside(s, hidden, row, part.left - 1, part.right + 1);
    const auto expand = [&, target = hidden.row(row)](const auto& source) {
      hidden_product(s, source, w.expand, w.expand_bias.data(), columns, hidden.plane,
                     [=](int64_t place, Vec sum) { store(target + place, gelu(sum)); });
    };
    if (norm.weight) {
      expand(NormalRow{x + row * row_size, s.channels, norm, scratch.normal});
    } else {
      expand(Row{x + row * row_size, s.channels});
    }
    const int64_t done = row - 1;
    if (done < part.top) continue;
    for (int64_t begin = part.left; begin < part.right; begin += kPiece) {
      const Span piece{begin, std::min(begin + kPiece, part.right)};
      float *result = scratch.mixed.data() - begin * step, *to = y + done * row_size + begin * s.channels;
      const float* next = x + std::min(row + 1, s.height - 1) * row_size + begin * s.channels;
      for (int64_t v = 0; v < s.hidden_vectors; ++v) {
        // A line of x for every sum: the next row of the map, spread over the time in which nothing else is loaded
        const float* ahead = next + (v * (piece.to - begin) - begin) * kLanes;
        const bool more = v < s.channel_vectors;
        filter(w, step, Around(hidden, done), piece, v, [=](int64_t column, Vec sum, Vec centre) {
          if (more) __builtin_prefetch(ahead + column * kLanes);
          store(result + column * step + v * kLanes, gelu(sum) + centre);
        });
      }
      channel_product(s, piece.to - begin, scratch.mixed.data(), w.reduce, w.reduce_bias.data(), to);
      row_sums.add(part, done, piece.to - begin, s.channels, to);
    }
  }
}

void check(const Tensor& x, const Tensor& proj_weight, const Tensor& dwc_weight, const Tensor& aggr_weight) {
  require(x.dim() == 4 && x.is_float(), "conv_ffn takes a float32 map (B, C, H, W) on the CPU");
  require(proj_weight.size(1) == x.size(1) && dwc_weight.size(0) == proj_weight.size(0) &&
              dwc_weight.numel() == kTaps * proj_weight.size(0) && aggr_weight.size(1) == proj_weight.size(0) &&
              aggr_weight.size(0) == x.size(1),
          "conv_ffn's weights do not fit the map or each other");
}

std::tuple<Tensor, Tensor> conv_ffn_fused(
    const Tensor& input, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    double eps, const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& dwc_weight,
    const Tensor& dwc_bias, const Tensor& aggr_weight, const Tensor& aggr_bias, int64_t pooled) {
  check(input, proj_weight, dwc_weight, aggr_weight);
  require(norm_weight.has_value() == norm_bias.has_value(), "conv_ffn_fused takes both of the norm or none");
  require(!norm_weight || (norm_weight->numel() == input.size(1) && norm_bias->numel() == input.size(1)),
          "conv_ffn_fused: the norm does not fit the map");
  require(0 <= pooled && pooled <= input.size(1), "conv_ffn_fused: more channels are to be averaged than there are");
  const Tensor x = input.channels_last();
  Tensor y = empty_map(x.sizes());
  if (x.numel() == 0) return {y, filled({x.size(0), pooled}, NAN)};
  Norm norm = {};
  Tensor scale, shift;
  if (norm_weight) {
    scale = norm_weight->contiguous();
    shift = norm_bias->contiguous();
    norm = {scale.data(), shift.data(), static_cast<float>(eps)};
  }
  const Sizes s(x, proj_weight);
  const Weights w(proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, aggr_bias);
  const int64_t width = band_width(s, 3, 1), parts = number_of_parts(s, width);
  const int64_t image_size = s.height * s.width * s.channels;
  const float* from = x.data();
  float* to = y.data();
  RowSums row_sums(s, width, pooled);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    ForwardScratch scratch(s, width, norm.weight);
    for (int64_t part = begin; part < end; ++part) {
      for_segments(s, width, part, parts, [&](const Segment& segment) {
        const int64_t offset = segment.image * image_size;
        forward_segment(s, w, norm, from + offset, to + offset, row_sums, segment, scratch);
      });
    }
  });
  return {y, row_sums.means(s)};
}

Tensor conv_ffn(const Tensor& x, const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& dwc_weight,
                const Tensor& dwc_bias, const Tensor& aggr_weight, const Tensor& aggr_bias) {
  return std::get<0>(conv_ffn_fused(x, std::nullopt, std::nullopt, 0, proj_weight, proj_bias, dwc_weight, dwc_bias,
                                    aggr_weight, aggr_bias, 0));
}

// --- backward -------------------------------------------------------------------------------------------------------

// Gradients of the parameters as one part of the work sums them; `expand` and `reduce` are (channels, hidden).
struct Gradients {
  Floats expand, expand_bias, taps, taps_bias, reduce, reduce_bias;

  explicit Gradients(const Sizes& s)
      : expand(s.channels * s.padded_hidden), expand_bias(s.padded_hidden), taps(kTaps * s.padded_hidden),
        taps_bias(s.padded_hidden), reduce(s.channels * s.padded_hidden), reduce_bias(s.channels) {}
};

// What a thread keeps while it walks down. gu is the gradient of the depth-wise convolution's result.
struct Scratch {
  RollingRows hidden, slope, gu, gv;
  Floats mixed, row_sums;

  Scratch(const Sizes& s, int64_t width)
      : hidden(3, width + 4, s.hidden_vectors), slope(3, width + 4, s.hidden_vectors),
        gu(3, width + 4, s.hidden_vectors), gv(2, width + 4, s.hidden_vectors), mixed((width + 2) * s.padded_hidden),
        row_sums(s.channels) {}

  void begin_at(int64_t column) {
    hidden.first = slope.first = gu.first = gv.first = column;
  }
};

ESC_ARCH_INLINE void add_to(float* sum, Vec value) {
  store(sum, load(sum) + value);
}

// sums (channels, hidden) += map (pixels, channels) transposed times hidden (pixels, hidden).
void add_outer_products(const Sizes& s, int64_t pixels, const float* map, const float* hidden, float* sums) {
  const int64_t step = s.padded_hidden;
  product(s.channels, s.hidden_vectors, pixels, {map, 1, s.channels}, hidden, step, nullptr,
          [=](int64_t m, int64_t v, Vec sum) { add_to(sums + m * step + v * kLanes, sum); });
}

// Both hidden maps that backward needs again, h and the slope of its GELU, of one row.
void recompute_row(const Sizes& s, const Weights& w, const float* x_row, const Segment& part, int64_t row,
                   Scratch& scratch) {
  const Span columns = inside(s, scratch.hidden, row, part.left - 2, part.right + 2);
  float *value = scratch.hidden.row(row), *slope = scratch.slope.row(row);
  hidden_product(s, Row{x_row, s.channels}, w.expand, w.expand_bias.data(), columns, scratch.hidden.plane,
                 [=](int64_t place, Vec sum) {
                   const GeluAndSlope g = gelu_and_slope(sum);
                   store(value + place, g.value);
                   store(slope + place, g.slope);
                 });
}

// The gradients of the depth-wise convolution's taps and bias, of one row of the segment.
void add_filter_gradients(const Sizes& s, const Segment& part, int64_t row, Scratch& scratch, Gradients& gradients) {
  const int64_t step = s.padded_hidden;
  const Around hidden(scratch.hidden, row);
  const float* gu_row = scratch.gu.row(row);
  for (int64_t v = 0; v < s.hidden_vectors; ++v) {
    Vec sums[kTaps] = {}, bias = {};
    for (int64_t column = part.left; column < part.right; ++column) {
      const int64_t place = v * hidden.plane + column * kLanes;
      const Vec gu = load(gu_row + place);
      bias += gu;
#pragma GCC unroll 3
      for (int64_t t = 0; t < 3; ++t) {
        sums[t] += gu * load(hidden.above + place + (t - 1) * kLanes);
        sums[t + 3] += gu * load(hidden.here + place + (t - 1) * kLanes);
        sums[t + 6] += gu * load(hidden.below + place + (t - 1) * kLanes);
      }
    }
    add_to(gradients.taps_bias.data() + v * kLanes, bias);
#pragma GCC unroll 9
    for (int64_t t = 0; t < kTaps; ++t) add_to(gradients.taps.data() + t * step + v * kLanes, sums[t]);
  }
}

void add_sum_of_pixels(int64_t pixels, int64_t channels, const float* map, float* row_sums, float* sums) {
  std::fill_n(row_sums, channels, 0.0f);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) row_sums[c] += map[p * channels + c];
  }
  for (int64_t c = 0; c < channels; ++c) sums[c] += row_sums[c];
}

// gu of a row, a column beyond the segment included; and, where the row is the segment's, the gradients behind it.
void backward_behind_filter(const Sizes& s, const Weights& w, const Floats& reduce_rows,
                            const float* gy_row, const Segment& part, int64_t row, Scratch& scratch,
                            Gradients* gradients) {
  const int64_t step = s.padded_hidden;
  const Span columns = inside(s, scratch.gu, row, part.left - 1, part.right + 1);
  if (columns.from >= columns.to) return;
  float *gv = scratch.gv.row(row), *gu = scratch.gu.row(row), *mixed = scratch.mixed.data() - (part.left - 1) * step;
  const int64_t plane = scratch.gv.plane;
  hidden_product(s, Row{gy_row, s.channels}, reduce_rows, nullptr, columns, plane,
                 [=](int64_t place, Vec sum) { store(gv + place, sum); });
  for (int64_t v = 0; v < s.hidden_vectors; ++v) {
    filter(w, step, Around(scratch.hidden, row), columns, v, [=](int64_t column, Vec sum, Vec centre) {
      const GeluAndSlope g = gelu_and_slope(sum);
      const int64_t place = v * plane + column * kLanes;
      store(gu + place, g.slope * load(gv + place));
      store(mixed + column * step + v * kLanes, g.value + centre);
    });
  }
  if (!gradients || row < part.top || row >= part.bottom) return;
  const int64_t pixels = part.right - part.left;
  const float* gy = gy_row + part.left * s.channels;
  add_outer_products(s, pixels, gy, mixed + part.left * step, gradients->reduce.data());
  add_sum_of_pixels(pixels, s.channels, gy, scratch.row_sums.data(), gradients->reduce_bias.data());
  add_filter_gradients(s, part, row, scratch, *gradients);
}

// The gradient of proj's result of one of the segment's rows, into `mixed`, and the gradients before it.
void backward_before_filter(const Sizes& s, const Weights& w, const Floats& expand_rows,
                            const float* x_row, float* gx_row, const Segment& part, int64_t row, Scratch& scratch,
                            Gradients* gradients) {
  const int64_t step = s.padded_hidden, pixels = part.right - part.left;
  const Around gu(scratch.gu, row);
  const float *gv = scratch.gv.row(row), *slope = scratch.slope.row(row);
  float* result = scratch.mixed.data() - part.left * step;
  for (int64_t v = 0; v < s.hidden_vectors; ++v) {
    Vec taps[kTaps], bias = {};
#pragma GCC unroll 9
    for (int64_t t = 0; t < kTaps; ++t) taps[t] = load(w.taps.data() + (kTaps - 1 - t) * step + v * kLanes);
    for (int64_t column = part.left; column < part.right; ++column) {
      const int64_t place = v * gu.plane + column * kLanes;
      Vec above = load(gv + place), here = {}, below = {};
#pragma GCC unroll 3
      for (int64_t t = 0; t < 3; ++t) {
        above += taps[t] * load(gu.above + place + (t - 1) * kLanes);
        here += taps[t + 3] * load(gu.here + place + (t - 1) * kLanes);
        below += taps[t + 6] * load(gu.below + place + (t - 1) * kLanes);
      }
      const Vec sum = (above + here + below) * load(slope + place);
      bias += sum;
      store(result + column * step + v * kLanes, sum);
    }
    if (gradients) add_to(gradients->expand_bias.data() + v * kLanes, bias);
  }
  if (gradients) {
    add_outer_products(s, pixels, x_row + part.left * s.channels, scratch.mixed.data(), gradients->expand.data());
  }
  if (gx_row) {
    channel_product(s, pixels, scratch.mixed.data(), expand_rows, nullptr, gx_row + part.left * s.channels);
  }
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors conv_ffn_backward(const Tensor& grad, const Tensor& input, const Tensor& proj_weight,
                               const Tensor& proj_bias, const Tensor& dwc_weight, const Tensor& dwc_bias,
                               const Tensor& aggr_weight, bool needs_input, bool needs_parameters) {
  check(input, proj_weight, dwc_weight, aggr_weight);
  require(grad.sizes() == input.sizes(), "conv_ffn_backward: the gradient has not the shape of the map");
  const Tensor x = input.channels_last();
  const Tensor gy = grad.channels_last();
  Tensor gx = empty_map(x.sizes());
  if (x.numel() == 0) {
    const auto none = [](const Tensor& parameter) { return zeros(parameter.sizes()); };
    return {gx, none(proj_weight), none(proj_bias), none(dwc_weight), none(dwc_bias), none(aggr_weight),
            zeros({x.size(1)})};
  }
  const Sizes s(x, proj_weight);
  const Weights w(proj_weight, proj_bias, dwc_weight, dwc_bias, aggr_weight, zeros({s.channels}));
  const Floats reduce_rows = packed(as_matrix(aggr_weight)), expand_rows = packed(as_matrix(proj_weight));
  const int64_t width = band_width(s, 12, 2), parts = number_of_parts(s, width);
  const int64_t row_size = s.width * s.channels, image_size = s.height * row_size;
  std::vector<Gradients> sums;
  for (int64_t part = 0; part < parts; ++part) sums.emplace_back(s);
  const float *x_data = x.data(), *gy_data = gy.data();
  float* gx_data = gx.data();
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(s, width);
    for (int64_t part = begin; part < end; ++part) {
      Gradients* gradients = needs_parameters ? &sums[part] : nullptr;
      for_segments(s, width, part, parts, [&](const Segment& segment) {
        const int64_t offset = segment.image * image_size;
        scratch.begin_at(segment.left - 2);
        for (int64_t row = segment.top - 2; row <= segment.bottom + 1; ++row) {
          recompute_row(s, w, x_data + offset + row * row_size, segment, row, scratch);
          const int64_t behind = row - 1, before = row - 2;
          if (behind < segment.top - 1) continue;
          backward_behind_filter(s, w, reduce_rows, gy_data + offset + behind * row_size, segment, behind, scratch,
                                 gradients);
          if (before < segment.top) continue;
          backward_before_filter(s, w, expand_rows, x_data + offset + before * row_size,
                                 needs_input ? gx_data + offset + before * row_size : nullptr, segment, before, scratch,
                                 gradients);
        }
      });
    }
  });
  const Gradients& total =
      sum_of_parts(sums, &Gradients::expand, &Gradients::expand_bias, &Gradients::taps, &Gradients::taps_bias,
                   &Gradients::reduce, &Gradients::reduce_bias);
  return {gx,
          unpacked(total.expand, s.channels, s.hidden, true, proj_weight.sizes()),
          unpacked(total.expand_bias, 1, s.hidden, false, proj_bias.sizes()),
          unpacked(total.taps, kTaps, s.hidden, true, dwc_weight.sizes()),
          unpacked(total.taps_bias, 1, s.hidden, false, dwc_bias.sizes()),
          unpacked(total.reduce, s.channels, s.hidden, false, aggr_weight.sizes()),
          unpacked(total.reduce_bias, 1, s.channels, false, {s.channels})};
}

}  // namespace
}  // namespace esc_arch

STABLE_TORCH_LIBRARY_FRAGMENT(esc_arch, m) {
  m.def(
      "conv_ffn_cpu(Tensor x, Tensor proj_weight, Tensor proj_bias, Tensor dwc_weight, Tensor dwc_bias, "
      "Tensor aggr_weight, Tensor aggr_bias) -> Tensor");
  m.def(
      "conv_ffn_fused_cpu(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor proj_weight, "
      "Tensor proj_bias, Tensor dwc_weight, Tensor dwc_bias, Tensor aggr_weight, Tensor aggr_bias, int pooled) "
      "-> (Tensor, Tensor)");
  m.def(
      "conv_ffn_backward_cpu(Tensor grad, Tensor x, Tensor proj_weight, Tensor proj_bias, Tensor dwc_weight, "
      "Tensor dwc_bias, Tensor aggr_weight, bool needs_input, bool needs_parameters) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(esc_arch, CPU, m) {
  m.impl("conv_ffn_cpu", ESC_ARCH_KERNEL(esc_arch::conv_ffn));
  m.impl("conv_ffn_fused_cpu", ESC_ARCH_KERNEL(esc_arch::conv_ffn_fused));
  m.impl("conv_ffn_backward_cpu", ESC_ARCH_KERNEL(esc_arch::conv_ffn_backward));
}
