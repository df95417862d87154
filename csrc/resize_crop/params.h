// Converts a planar YUV frame to planar RGB: resizes every plane to the same rectangle, of which
// only a square is computed, then converts the colours.
//
//   plane'[i][j] = Σ_y Σ_x rows.weights[i][y] · columns.weights[j][x] · plane[y][x]
//   out[c][i][j] = round(colours[c] · (Y'[i][j], U'[i][j], V'[i][j], 1)), within 0 and 255
//
// Each plane is filtered straight from its own size; chroma is never resized to luma's first.
#pragma once

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

// One axis: output i = Σ_k weights[i·taps + k] · input[first[i] + k], k < taps. All these inputs
// exist, and first does not decrease.
struct ResizeFilter {
  const int32_t* first = nullptr;
  const float* weights = nullptr;
  int64_t size = 0, taps = 0;
};

struct ResizeCropParams {
  static constexpr int kPlanes = 3;  // Y, U, V
  // [height, width] each, uint8 or uint16; rows are contiguous, with gaps between them allowed.
  Tensor planes[kPlanes];
  ResizeFilter rows[kPlanes], columns[kPlanes];  // all rows of one size, all columns of one size
  const float* colours = nullptr;                // [3, 4]
  uint8_t* out = nullptr;                        // [3, rows.size, columns.size]
  void* workspace = nullptr;
};

CLIPVIP_CPU_KERNEL(resize_crop, ResizeCropParams)

}  // namespace clipvip
