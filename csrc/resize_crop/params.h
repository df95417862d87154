// A planar YUV frame to planar RGB: every plane resized to the same rectangle, of which only a
// square is computed, then the colours.
//
//   plane'[i][j] = Σ_y Σ_x rows.weights[i][y] · columns.weights[j][x] · plane[y][x]
//   out[c][i][j] = round(colours[c] · (Y'[i][j], U'[i][j], V'[i][j], 1)), within 0 and 255
//
// Each plane is filtered straight from its own size, so chroma is never brought to luma's first.
#pragma once

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

// One axis: output i is the sum of weights[i·taps + k] times input first[i] + k over k < taps,
// which all exist. first does not fall.
struct ResizeFilter {
  const int32_t* first = nullptr;
  const float* weights = nullptr;
  int64_t size = 0, taps = 0;
};

struct ResizeCropParams {
  static constexpr int kPlanes = 3;  // Y, U, V
  // [height, width] of uint8 or uint16 each. Rows may lie apart, elements of a row not.
  Tensor planes[kPlanes];
  ResizeFilter rows[kPlanes], columns[kPlanes];  // of one size each
  const float* colours = nullptr;                // [3, 4]
  uint8_t* out = nullptr;                        // [3, rows.size, columns.size]
  void* workspace = nullptr;  // where there is none, only its size is computed
  int64_t* workspace_bytes = nullptr;
};

CLIPVIP_CPU_KERNEL(resize_crop, ResizeCropParams)

}  // namespace clipvip
