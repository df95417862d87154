// resize_crop as Python calls it (module.h says how). clipvip/ops/resize_crop.py checks shapes.
#pragma once

#include <cstdint>
#include <vector>

#include "resize_crop/params.h"

namespace clipvip {

// filters: (first, weights) of rows and of columns for Y, then U, then V. Runs in one thread.
inline int64_t resize_crop_op(const std::vector<Tensor>& planes, const std::vector<Tensor>& filters,
                              const Tensor& colours, const Tensor& out, int /*threads*/,
                              uintptr_t workspace) {
  const auto filter = [&](size_t i) {
    const Tensor& weights = filters.at(i + 1);
    return ResizeFilter{filters.at(i).as<const int32_t>(), weights.as<const float>(),
                        weights.size[0], weights.size[1]};
  };
  ResizeCropParams p;
  for (int i = 0; i < ResizeCropParams::kPlanes; ++i) {
    p.planes[i] = planes.at(i);
    p.rows[i] = filter(4 * i), p.columns[i] = filter(4 * i + 2);
  }
  p.colours = colours.as<const float>();
  p.out = out.as<uint8_t>();
  p.workspace = reinterpret_cast<void*>(workspace);
  return resize_crop(p);
}

}  // namespace clipvip
