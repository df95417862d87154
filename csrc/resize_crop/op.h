// What Python calls; returns the bytes of workspace it needs, and does no more than that where none
// is given. Shapes are checked in clipvip/ops/resize_crop.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "resize_crop/params.h"

namespace clipvip {

// filters: (first, weights) of rows and of columns for Y, then U, then V.
inline int64_t resize_crop_op(const std::vector<Tensor>& planes, const std::vector<Tensor>& filters,
                              const Tensor& colours, const Tensor& out,
                              std::optional<uintptr_t> workspace) {
  const auto filter = [&](size_t i) {
    const Tensor& weights = filters.at(i + 1);
    return ResizeFilter{filters.at(i).as<const int32_t>(), weights.as<const float>(),
                        weights.size[0], weights.size[1]};
  };
  int64_t bytes = 0;
  ResizeCropParams p;
  for (int i = 0; i < ResizeCropParams::kPlanes; ++i) {
    p.planes[i] = planes.at(i);
    p.rows[i] = filter(4 * i), p.columns[i] = filter(4 * i + 2);
  }
  p.colours = colours.as<const float>();
  p.out = out.as<uint8_t>();
  p.workspace = reinterpret_cast<void*>(workspace.value_or(0)), p.workspace_bytes = &bytes;
  resize_crop(p);
  return bytes;
}

}  // namespace clipvip
