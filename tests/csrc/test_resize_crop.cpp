// Every instruction set against sums in double. Planes, filters, output and workspace are exactly
// as large as they have to be, so that the sanitizers see a step outside.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "resize_crop/params.h"

namespace {

using clipvip::DType;
using clipvip::ResizeCropParams;
using clipvip::ResizeFilter;

constexpr int kPlanes = ResizeCropParams::kPlanes;

struct Case {
  int64_t height, width, chroma_height, chroma_width, rows, columns, taps;
  bool wide;
};

unsigned seed = 1;
unsigned next() {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8;
}

struct Filter {
  std::vector<int32_t> first;
  std::vector<float> weights;
  int64_t taps;

  Filter(int64_t length, int64_t size, int64_t most) : taps(most < length ? most : length) {
    for (int64_t i = 0; i < size; ++i) {
      // As where the middle is cut out: the first inputs are not read.
      const int64_t room = length - taps, aside = room / 4;
      first.push_back(int32_t(aside + (size > 1 ? (room - aside) * i / (size - 1) : 0)));
    }
    for (int64_t i = 0; i < size * taps; ++i) weights.push_back(float(next() % 1000) / 1000 / taps);
  }
  ResizeFilter handed() const {
    return {first.data(), weights.data(), int64_t(first.size()), taps};
  }
};

// The number of outputs that are wrong.
int run(const Case& c) {
  ResizeCropParams p;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<uint16_t>> words;
  std::vector<Filter> rows, columns;
  for (int i = 0; i < kPlanes; ++i) {
    const int64_t height = i ? c.chroma_height : c.height, width = i ? c.chroma_width : c.width;
    const int64_t stride = width + 3, count = (height - 1) * stride + width;
    bytes.emplace_back(count), words.emplace_back(count);
    for (int64_t k = 0; k < count; ++k) {
      words[i][k] = uint16_t(next() % 1024);
      bytes[i][k] = uint8_t(words[i][k]);
    }
    p.planes[i].data = c.wide ? (void*)words[i].data() : (void*)bytes[i].data();
    p.planes[i].dtype = c.wide ? DType::uint16 : DType::uint8;
    p.planes[i].ndim = 2;
    p.planes[i].size[0] = height, p.planes[i].size[1] = width;
    p.planes[i].stride[0] = stride, p.planes[i].stride[1] = 1;
    rows.emplace_back(height, c.rows, c.taps), columns.emplace_back(width, c.columns, c.taps + 1);
  }
  for (int i = 0; i < kPlanes; ++i) p.rows[i] = rows[i].handed(), p.columns[i] = columns[i].handed();
  const std::vector<float> colours = {1.2f, 0.f, 1.6f, -200.f, 0.9f, -.4f, -.8f, 100.f,
                                      1.2f, 2.f, 0.f,  -250.f};
  p.colours = colours.data();
  const int64_t needed = clipvip::resize_crop(p);
  std::vector<uint8_t> out(3 * c.rows * c.columns);
  p.out = out.data();
  p.workspace = std::aligned_alloc(64, size_t(needed));
  clipvip::resize_crop(p);
  std::free(p.workspace);

  int wrong = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      double yuv[kPlanes] = {};
      for (int plane = 0; plane < kPlanes; ++plane) {
        const Filter &down = rows[plane], &across = columns[plane];
        for (int64_t k = 0; k < down.taps; ++k) {
          for (int64_t l = 0; l < across.taps; ++l) {
            const int64_t at = (down.first[i] + k) * p.planes[plane].stride[0] + across.first[j] + l;
            yuv[plane] += double(down.weights[i * down.taps + k]) *
                          across.weights[j * across.taps + l] *
                          (c.wide ? words[plane][at] : bytes[plane][at]);
          }
        }
      }
      for (int channel = 0; channel < 3; ++channel) {
        const float* m = &colours[4 * channel];
        double expected = m[0] * yuv[0] + m[1] * yuv[1] + m[2] * yuv[2] + m[3];
        expected = expected < 0 ? 0 : expected > 255 ? 255 : expected;
        const uint8_t found = out[(channel * c.rows + i) * c.columns + j];
        if (std::fabs(found - expected) <= 0.501) continue;
        if (!wrong++) {
          std::printf("%ldx%ld to %ldx%ld: [%d, %ld, %ld] is %d, expected %g\n", long(c.height),
                      long(c.width), long(c.rows), long(c.columns), channel, long(i), long(j), found,
                      expected);
        }
      }
    }
  }
  return wrong;
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 4, false},       {2, 3, 1, 2, 5, 7, 4, false},
      {33, 70, 17, 35, 16, 16, 9, false}, {33, 70, 33, 35, 17, 31, 9, true},
      {48, 200, 24, 100, 40, 65, 6, false}, {19, 67, 19, 67, 33, 15, 28, true},
  };
  int wrong = 0;
  for (const auto& isa : clipvip::cpu_capabilities()) {
    clipvip::set_cpu_capability(isa);
    for (const Case& c : cases) {
      if (run(c)) std::printf("  on %s\n", isa.c_str()), ++wrong;
    }
  }
  return wrong != 0;
}
