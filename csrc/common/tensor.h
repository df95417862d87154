// What Python hands over: a pointer, a dtype, sizes and strides. Nothing here knows torch.
#pragma once

#include <cstdint>

namespace clipvip {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, int32 = 3, uint8 = 4, uint16 = 5 };

struct Tensor {
  static constexpr int kMaxDims = 4;
  void* data = nullptr;
  DType dtype = DType::float32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace clipvip
