// Maps that operators of a network hand on to each other.
//
// The C library gives blocks of some tens of megabytes back to the system when they are freed, and the system clears
// their pages again one by one when they are next asked for: of a network at 640 x 360 a third of the time. While a
// network runs, freed blocks are kept for its next operators instead; when it is done, they are given back.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "tensors.h"

namespace esc_arch {

class Reuse {
 public:
  void begin() {
    const std::lock_guard<std::mutex> guard(mutex_);
    ++users_;
  }

  void end() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (users_ > 0 && --users_ == 0) blocks.swap(free_);
    }
    for (const Block& block : blocks) std::free(block.data);
  }

  // None where nothing runs, or the block is too small to be given back
  void* take(int64_t bytes) {
    if (bytes < kSmallest) return nullptr;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (users_ == 0) return nullptr;
      for (Block& block : free_)
        if (block.bytes == bytes) {
          void* data = block.data;
          std::swap(block, free_.back());
          free_.pop_back();
          return data;
        }
    }
    return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }

  void give(void* data, int64_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      // (Most that was free at a time is what a step of a network needs; others are of another size)
      if (users_ > 0 && free_.size() < kMost) {
        free_.push_back({data, bytes});
        return;
      }
    }
    std::free(data);
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  static constexpr int64_t kSmallest = 1 << 20, kAlignment = 64;
  static constexpr size_t kMost = 3;

  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t users_ = 0;
};

// Never destroyed: tensors may outlive everything
inline Reuse& reuse() {
  static Reuse* const instance = new Reuse;
  return *instance;
}

// An uninitialised map (B, C, H, W) with its channels innermost
inline Tensor empty_channels_last(const Dimensions& sizes) {
  return Tensor(empty_handle(sizes, sizes.channels_last()));
}

// The same, for a map that operators hand on
inline Tensor empty_map(const Dimensions& sizes) {
  const int64_t bytes = sizes.product() * int64_t(sizeof(float));
  void* data = reuse().take(bytes);
  if (data == nullptr) return empty_channels_last(sizes);
  return Tensor(handle_of(data, sizes, sizes.channels_last(), [bytes](void* block) { reuse().give(block, bytes); }));
}

}  // namespace esc_arch
