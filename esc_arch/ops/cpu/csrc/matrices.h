// Weights between tensors and what the operators compute with: rows of whole vectors.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace esc_arch {

// (rows, columns) with any strides -> rows of padded columns, the padding zero.
inline Floats packed(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), step = padded(columns);
  const at::Tensor plain = matrix.contiguous();
  const float* from = plain.const_data_ptr<float>();
  Floats result(rows * step + kLanes, 0.0f);
  for (int64_t row = 0; row < rows; ++row) std::copy_n(from + row * columns, columns, result.data() + row * step);
  return result;
}

inline at::Tensor as_matrix(const at::Tensor& weight) {
  return weight.reshape({weight.size(0), -1});
}

// (rows, padded columns) -> rows x columns of a tensor, transposed where its shape is (columns, rows, ...).
inline at::Tensor unpacked(const Floats& sums, int64_t rows, int64_t columns, bool transposed, at::IntArrayRef shape) {
  at::Tensor matrix = at::from_blob(const_cast<float*>(sums.data()), {rows, columns}, {padded(columns), 1}, at::kFloat);
  return (transposed ? matrix.t() : matrix).clone(at::MemoryFormat::Contiguous).view(shape);
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
