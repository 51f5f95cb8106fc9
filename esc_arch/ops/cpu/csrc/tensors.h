// What the operators know of PyTorch: tensors of float32 on the CPU, threads, errors and registration.
//
// With TORCH_TARGET_VERSION this is libtorch's stable ABI: what is compiled serves that version and all later ones.
// PyTorch 2.11 is the first with all of it (tensors of memory with a deleter); with older ones ATen does the same.
#pragma once

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#else
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace esc_arch {

constexpr int64_t kMostDimensions = 6;

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error((text(parts) + ...));
}

// The sizes or strides of a tensor
class Dimensions {
 public:
  Dimensions() = default;
  Dimensions(std::initializer_list<int64_t> each) : Dimensions(each.begin(), each.size()) {}
  Dimensions(const int64_t* each, int64_t count) : count_(count) {
    require(count <= kMostDimensions, "the C++ operators take tensors of up to 6 dimensions");
    std::copy_n(each, count, each_.begin());
  }

  int64_t size() const { return count_; }
  const int64_t* data() const { return each_.data(); }
  int64_t& operator[](int64_t d) { return each_[d]; }
  int64_t operator[](int64_t d) const { return each_[d]; }
  bool operator==(const Dimensions&) const = default;

  int64_t product() const {
    int64_t result = 1;
    for (int64_t d = 0; d < count_; ++d) result *= each_[d];
    return result;
  }

  // Strides of a tensor of these sizes whose last dimension is innermost, and of a map whose channels are
  Dimensions contiguous() const {
    Dimensions strides = *this;
    int64_t step = 1;
    for (int64_t d = count_ - 1; d >= 0; step *= std::max<int64_t>(each_[d--], 1)) strides[d] = step;
    return strides;
  }
  Dimensions channels_last() const {
    require(count_ == 4, "the C++ operators take maps of 4 dimensions");
    const int64_t pixel = std::max<int64_t>(each_[1], 1), row = pixel * std::max<int64_t>(each_[3], 1);
    return {row * std::max<int64_t>(each_[2], 1), 1, row, pixel};
  }

 private:
  int64_t count_ = 0;
  std::array<int64_t, kMostDimensions> each_{};  // zero beyond the last
};

inline std::string text(const Dimensions& part) {
  std::string result = "[";
  for (int64_t d = 0; d < part.size(); ++d) result += (d ? ", " : "") + std::to_string(part[d]);
  return result + "]";
}

// --- the two kinds of PyTorch ---------------------------------------------------------------------------------------

#ifdef TORCH_TARGET_VERSION

using Handle = torch::stable::Tensor;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;

inline Handle empty_handle(const Dimensions& sizes, const Dimensions& strides) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &made));
  return Handle(made);
}

// A tensor of memory that `free`(memory) takes back
template <typename Free>
Handle handle_of(void* memory, const Dimensions& sizes, const Dimensions& strides, Free free) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(memory, sizes, strides, cpu, torch::headeronly::ScalarType::Float, free);
}

inline void copy_handle(const Handle& from, const Handle& to) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

#else

using Handle = at::Tensor;
using at::get_num_threads;
using at::parallel_for;

inline at::IntArrayRef listed(const Dimensions& each) { return {each.data(), size_t(each.size())}; }

inline Handle empty_handle(const Dimensions& sizes, const Dimensions& strides) {
  return at::empty_strided(listed(sizes), listed(strides), at::kFloat);
}

template <typename Free>
Handle handle_of(void* memory, const Dimensions& sizes, const Dimensions& strides, Free free) {
  return at::from_blob(memory, listed(sizes), listed(strides), free, at::kFloat);
}

inline void copy_handle(const Handle& from, const Handle& to) { to.copy_(from); }

#define STABLE_TORCH_LIBRARY_FRAGMENT TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define TORCH_BOX(function) function

#endif

// A tensor or a view of one, with its sizes and strides at hand: asking PyTorch for each of them would take longer.
// Of a view, too, PyTorch gets the whole tensor.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Handle& whole)
      : handle_(whole), sizes_(whole.sizes().data(), whole.dim()), strides_(whole.strides().data(), whole.dim()),
        // (Only what was made here is written to)
        data_(static_cast<float*>(const_cast<void*>(whole.const_data_ptr()))),
        is_float_(whole.scalar_type() == c10::ScalarType::Float && whole.is_cpu()) {}

  operator const Handle&() const { return *handle_; }
  bool defined() const { return handle_.has_value(); }
  int64_t dim() const { return sizes_.size(); }
  int64_t numel() const { return sizes_.product(); }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const Dimensions& sizes() const { return sizes_; }

  // float32 on the CPU
  bool is_float() const { return is_float_; }
  float* data() const {
    require(is_float_, "the C++ operators take tensors of float32 on the CPU");
    return data_;
  }

  bool is_contiguous() const { return is_laid_out(sizes_.contiguous()); }
  bool is_channels_last() const { return dim() == 4 && is_laid_out(sizes_.channels_last()); }
  Tensor contiguous() const { return laid_out(sizes_.contiguous()); }
  Tensor channels_last() const { return laid_out(sizes_.channels_last()); }

  Tensor view(const Dimensions& sizes, const Dimensions& strides) const {
    Tensor result = *this;
    result.sizes_ = sizes;
    result.strides_ = strides;
    return result;
  }
  Tensor narrow(int64_t d, int64_t first, int64_t count) const {
    Tensor result = *this;
    result.sizes_[d] = count;
    result.data_ += first * strides_[d];
    return result;
  }
  Tensor transpose(int64_t a, int64_t b) const {
    Tensor result = *this;
    std::swap(result.sizes_[a], result.sizes_[b]);
    std::swap(result.strides_[a], result.strides_[b]);
    return result;
  }

  // Of the same sizes
  void copy_to(const Tensor& other) const {
    const auto keep = [](void*) {};
    copy_handle(handle_of(data(), sizes_, strides_, keep), handle_of(other.data(), sizes_, other.strides_, keep));
  }

 private:
  bool is_laid_out(const Dimensions& strides) const {
    for (int64_t d = 0; d < dim(); ++d)
      if (sizes_[d] != 1 && strides_[d] != strides[d]) return numel() == 0;
    return true;
  }

  // Itself, if it is, with these strides also where they make no difference
  Tensor laid_out(const Dimensions& strides) const {
    if (is_laid_out(strides)) return view(sizes_, strides);
    const Tensor result(empty_handle(sizes_, strides));
    copy_to(result);
    return result;
  }

  std::optional<Handle> handle_;
  Dimensions sizes_, strides_;
  float* data_ = nullptr;
  bool is_float_ = false;
};

inline Tensor empty(const Dimensions& sizes) { return Tensor(empty_handle(sizes, sizes.contiguous())); }

inline Tensor filled(const Dimensions& sizes, float value) {
  const Tensor result = empty(sizes);
  std::fill_n(result.data(), result.numel(), value);
  return result;
}

inline Tensor zeros(const Dimensions& sizes) { return filled(sizes, 0); }

template <typename Other>
struct Passed {
  using Type = Other;
};
template <>
struct Passed<Tensor> {
  using Type = Handle;
};
template <>
struct Passed<const Tensor&> {
  using Type = const Handle&;
};
template <>
struct Passed<const std::optional<Tensor>&> {
  using Type = const std::optional<Handle>&;
};
template <typename... Each>
struct Passed<std::tuple<Each...>> {
  using Type = std::tuple<typename Passed<Each>::Type...>;
};

// A function of Tensors as a kernel of PyTorch's
template <auto function>
struct Kernel;
template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Kernel<function> {
  static typename Passed<Result>::Type call(typename Passed<Arguments>::Type... each) { return function(each...); }
};

#define ESC_ARCH_KERNEL(function) TORCH_BOX((&esc_arch::Kernel<&function>::call))

}  // namespace esc_arch
