// Weights between tensors and what the operators compute with: rows of whole vectors.
#pragma once


#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"
#include "vectors.h"

namespace esc_arch {

// (rows, columns) with any strides -> rows of padded columns, the padding zero.
inline Floats packed(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), step = padded(columns);
  const float* from = matrix.data();
  Floats result(rows * step + kLanes, 0.0f);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      result[row * step + column] = from[row * matrix.stride(0) + column * matrix.stride(1)];
  return result;
}

inline Tensor as_matrix(const Tensor& weight) {
  const int64_t rows = weight.size(0), columns = weight.numel() / std::max<int64_t>(rows, 1);
  return weight.contiguous().view({rows, columns}, {columns, 1});
}

inline Tensor as_row(const Tensor& bias) {
  return bias.view({1, bias.numel()}, {0, bias.stride(0)});
}

// (rows, padded columns) -> rows x columns of a tensor, transposed where its shape is (columns, rows, ...).
inline Tensor unpacked(const Floats& sums, int64_t rows, int64_t columns, bool transposed, const Dimensions& shape) {
  const Tensor result = empty(shape);
  float* const to = result.data();
  const int64_t row_step = transposed ? 1 : columns, column_step = transposed ? rows : 1;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      to[row * row_step + column * column_step] = sums[row * padded(columns) + column];
  return result;
}

// What the parts of some work have summed, into the first of them: in their order, so that it is the same every time.
template <typename Part, typename... Member>
Part& sum_of_parts(std::vector<Part>& parts, Member... members) {
  const auto add = [&](auto member) {
    for (size_t part = 1; part < parts.size(); ++part) {
      for (size_t i = 0; i < (parts[0].*member).size(); ++i) (parts[0].*member)[i] += (parts[part].*member)[i];
    }
  };
  (add(members), ...);
  return parts[0];
}

}  // namespace esc_arch
