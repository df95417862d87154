// A tensor as Python passes it: a pointer, a dtype, sizes and strides. Nothing here knows torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

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

  // Returns the values. Raises unless there are at least `count`, contiguous; T is float or
  // int32_t.
  template <typename T>
  T* dense(int64_t count) const {
    using Number = std::remove_const_t<T>;
    static_assert(std::is_same_v<Number, float> || std::is_same_v<Number, int32_t>);
    const DType expected = std::is_same_v<Number, float> ? DType::float32 : DType::int32;
    bool whole = dtype == expected;
    int64_t numbers = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      whole &= size[i] <= 1 || stride[i] == numbers;
      numbers *= size[i];
    }
    if (numbers < count || (numbers > 0 && !whole)) {
      throw std::invalid_argument("a tensor is not the contiguous " +
                                  std::string(expected == DType::float32 ? "float32" : "int32") +
                                  " [" + std::to_string(count) + "] that its kernel reads");
    }
    return as<T>();
  }
  // Raises unless the dtype is `expected` and the rows are contiguous and `width` long.
  void expect_rows(DType expected, int64_t width) const {
    if (dtype != expected || ndim < 2 || size[ndim - 1] != width ||
        (width > 1 && stride[ndim - 1] != 1)) {
      throw std::invalid_argument("a tensor does not have the dtype, or the contiguous rows, of " +
                                  std::to_string(width) + ", that its kernel reads");
    }
  }
};

}  // namespace clipvip
