// A caller's workspace, cut into the pieces that a kernel needs.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace clipvip {
namespace CLIPVIP_ISA {

// Hands out consecutive cache-aligned pieces; with no memory behind it, it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  CLIPVIP_INLINE T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
