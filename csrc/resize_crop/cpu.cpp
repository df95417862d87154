// Computes kLanes output rows at a time, so that both filters run along lanes without a gather:
//
//   down     filters columns, with columns as lanes: gives kLanes rows of the width that is read
//   turn     transposes kLanes × kLanes blocks
//   across   filters rows, with output rows as lanes: each tap is one load
//   colours  converts, turns back and stores bytes
//
// Intermediate results, kLanes rows of one plane, stay in the core's caches. Where a frame shrinks,
// filtering down first leaves the least to filter across.
#include "common/arena.h"
#include "resize_crop/params.h"

namespace clipvip {
namespace CLIPVIP_ISA {
namespace {

constexpr int kPlanes = ResizeCropParams::kPlanes;
constexpr int kTogether = 4;  // vectors of columns per broadcast of a weight

CLIPVIP_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The columns of a plane that are read.
struct Span {
  int64_t begin, length;
  explicit Span(const ResizeFilter& columns)
      : begin(columns.first[0]),
        length(columns.first[columns.size - 1] + columns.taps - columns.first[0]) {}
};

// One output row over the columns of `span`; `line` has room for round_up(span.length).
template <typename T>
CLIPVIP_INLINE void filter_down(const Tensor& plane, const ResizeFilter& rows, int64_t i,
                                const Span& span, float* line) {
  const float* weights = rows.weights + i * rows.taps;
  const T* top = plane.as<const T>() + rows.first[i] * plane.stride[0] + span.begin;
  int64_t x = 0;
  for (; x + kTogether * kLanes <= span.length; x += kTogether * kLanes) {
    Vec sum[kTogether];
#pragma GCC unroll 4
    for (int v = 0; v < kTogether; ++v) sum[v] = zero();
    for (int64_t k = 0; k < rows.taps; ++k) {
      const Vec weight = broadcast(weights[k]);
#pragma GCC unroll 4
      for (int v = 0; v < kTogether; ++v) {
        sum[v] = fma(weight, load(top + k * plane.stride[0] + x + v * kLanes), sum[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTogether; ++v) store(line + x + v * kLanes, sum[v]);
  }
  for (; x < span.length; x += kLanes) {
    const int64_t left = span.length - x;
    Vec sum = zero();
    for (int64_t k = 0; k < rows.taps; ++k) {
      const T* p = top + k * plane.stride[0] + x;
      sum = fma(broadcast(weights[k]), left < kLanes ? load_first(p, left) : load(p), sum);
    }
    store(line + x, sum);
  }
}

// lines: kLanes rows, `pitch` apart. turned: [pitch, kLanes].
CLIPVIP_INLINE void turn(const float* lines, int64_t pitch, float* turned) {
  for (int64_t x = 0; x < pitch; x += kLanes) {
    Vec block[kLanes];
    for (int j = 0; j < kLanes; ++j) block[j] = load(lines + j * pitch + x);
    transpose(block);
    for (int j = 0; j < kLanes; ++j) store(turned + (x + j) * kLanes, block[j]);
  }
}

// `count` outputs from j on, whose sums are independent and so run at the same time.
template <int count>
CLIPVIP_INLINE void filter_some_across(const float* turned, const ResizeFilter& columns,
                                       const Span& span, int64_t j, float* out) {
  const float* weights = columns.weights + j * columns.taps;
  const float* from[count];
  Vec sum[count];
#pragma GCC unroll 4
  for (int v = 0; v < count; ++v) {
    from[v] = turned + (columns.first[j + v] - span.begin) * kLanes;
    sum[v] = zero();
  }
  for (int64_t k = 0; k < columns.taps; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) {
      sum[v] = fma(broadcast(weights[v * columns.taps + k]), load(from[v] + k * kLanes), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < count; ++v) store(out + (j + v) * kLanes, sum[v]);
}

CLIPVIP_INLINE void filter_across(const float* turned, const ResizeFilter& columns,
                                  const Span& span, float* out) {
  int64_t j = 0;
  for (; j + kTogether <= columns.size; j += kTogether) {
    filter_some_across<kTogether>(turned, columns, span, j, out);
  }
  for (; j < columns.size; ++j) filter_some_across<1>(turned, columns, span, j, out);
}

// Rows [row, row + count) of the three colours, from [columns, kLanes] of each plane.
CLIPVIP_INLINE void store_colours(const ResizeCropParams& p, float* const (&filtered)[kPlanes],
                                  int64_t row, int64_t count) {
  const int64_t height = p.rows[0].size, width = p.columns[0].size;
  for (int c = 0; c < 3; ++c) {
    const float* m = p.colours + 4 * c;
    uint8_t* plane = p.out + (c * height + row) * width;
    for (int64_t x = 0; x < width; x += kLanes) {
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const int64_t at = (x + j) * kLanes;
        Vec sum = fma(broadcast(m[0]), load(filtered[0] + at), broadcast(m[3]));
        sum = fma(broadcast(m[1]), load(filtered[1] + at), sum);
        block[j] = fma(broadcast(m[2]), load(filtered[2] + at), sum);
      }
      transpose(block);
      const int64_t left = width - x;
      for (int64_t j = 0; j < count; ++j) {
        if (left < kLanes) {
          store_first(plane + j * width + x, block[j], left);
        } else {
          store(plane + j * width + x, block[j]);
        }
      }
    }
  }
}

}  // namespace

int64_t resize_crop(const ResizeCropParams& p) {
  const int64_t height = p.rows[0].size, width = round_up(p.columns[0].size);
  int64_t pitch = 0;
  for (const ResizeFilter& columns : p.columns) {
    const int64_t length = round_up(Span(columns).length);
    pitch = pitch < length ? length : pitch;
  }
  Arena arena(p.workspace);
  float* lines = arena.take<float>(kLanes * pitch);
  float* turned = arena.take<float>(kLanes * pitch);
  float* filtered[kPlanes];
  for (float*& each : filtered) each = arena.take<float>(kLanes * width);
  if (!p.workspace) return arena.used();

  for (int c = 0; c < kPlanes; ++c) {  // columns that are computed but not stored
    for (int64_t i = p.columns[c].size * kLanes; i < width * kLanes; ++i) filtered[c][i] = 0;
  }
  for (int64_t row = 0; row < height; row += kLanes) {
    const int64_t count = height - row < kLanes ? height - row : kLanes;
    for (int c = 0; c < kPlanes; ++c) {
      const Span span(p.columns[c]);
      const int64_t apart = round_up(span.length);
      for (int64_t j = 0; j < kLanes; ++j) {
        const int64_t i = row + (j < count ? j : count - 1);
        if (p.planes[c].dtype == DType::uint8) {
          filter_down<uint8_t>(p.planes[c], p.rows[c], i, span, lines + j * apart);
        } else {
          filter_down<uint16_t>(p.planes[c], p.rows[c], i, span, lines + j * apart);
        }
      }
      turn(lines, apart, turned);
      filter_across(turned, p.columns[c], span, filtered[c]);
    }
    store_colours(p, filtered, row, count);
  }
  return 0;
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
