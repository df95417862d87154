// A matrix product that uses every device intrinsic and takes one planted fault of each kind.
// tests/emulator/test_emulator.py checks that the emulator detects them.
#pragma once

#include <string>

#include "common/device.cuh"
#include "common/tensor.h"

namespace clipvip::faults {

using namespace clipvip::device;

enum class Fault {
  none,
  no_barrier_before_use,
  no_barrier_before_refill,
  no_wait,
  wait_too_short,
  no_last_wait,
  tail_stored,
  tail_loaded,
  wrong_row,
  wrong_column,
  lane_leaves,
  warp_skips_barrier,
  unwritten,
  misaligned,
  between_arrays,
};

struct ProductParams {
  const bfloat16* a;  // [n, depth]
  const bfloat16* b;  // [m, depth]
  float* c;           // [n, m]
  int n, m, depth;    // depth a multiple of 8
  Fault fault;
};

constexpr int kTile = 64, kDepth = 32, kChunks = kDepth / 8, kStages = 2, kThreads = 128;

inline int at(int row, int chunk) { return row * kDepth + (chunk ^ (row >> 1 & 3)) * 8; }

// c = a·bᵀ: a block computes 64×64, a warp 16×64, in steps of 32 along depth.
__global__ inline void __launch_bounds__(kThreads) product(ProductParams p) {
  Shared shared;
  bfloat16* a = shared.take<bfloat16>(kStages * kTile * kDepth);
  bfloat16* b = shared.take<bfloat16>(kStages * kTile * kDepth);
  const int first_row = block_x() * kTile, first_column = block_y() * kTile;
  const int steps = (p.depth + kDepth - 1) / kDepth;

  const auto load = [&](int step) {
    const int stage = step % kStages * kTile * kDepth;
    for (int i = thread(); i < kTile * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, k = step * kDepth + chunk * 8;
      const int over = p.fault == Fault::tail_loaded ? 1 : 0;
      if (p.fault == Fault::unwritten && k >= p.depth) continue;
      const bool a_valid = first_row + row < p.n + over && k < p.depth;
      const bool b_valid = first_column + row < p.m && k < p.depth;
      const int skew = p.fault == Fault::misaligned ? 1 : 0;
      cp_async16(a + stage + at(row, chunk) + skew, p.a + int64_t{first_row + row} * p.depth + k,
                 a_valid);
      cp_async16(b + stage + at(row, chunk), p.b + int64_t{first_column + row} * p.depth + k,
                 b_valid);
    }
    cp_async_commit();
  };

  if (p.fault == Fault::between_arrays && thread() == 0) a[kStages * kTile * kDepth] = {0};

  float c[8][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    // no_last_wait: zeros past the end are copied too, which no result shows.
    const bool more = step + 1 < steps || p.fault == Fault::no_last_wait;
    if (more) load(step + 1);
    if (p.fault == Fault::no_wait) {
    } else if (more || p.fault == Fault::wait_too_short) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (p.fault == Fault::warp_skips_barrier && warp() == 1) return;
    if (p.fault != Fault::no_barrier_before_use) sync_block();
    const int stage = step % kStages * kTile * kDepth;
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t left[4];
      const int row = warp() * 16 + lane() % (p.fault == Fault::wrong_row ? 8 : 16);
      ldmatrix(left, a + stage + at(row, 2 * k + lane() / 16));
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t right[4];
        ldmatrix(right, b + stage + at(pair * 16 + lane() % 8 + lane() / 16 * 8,
                                       2 * k + lane() / 8 % 2));
        if (p.fault == Fault::lane_leaves && lane() == 31) return;
        mma<bfloat16>(c[2 * pair], left, right[0], right[1]);
        mma<bfloat16>(c[2 * pair + 1], left, right[2], right[3]);
      }
    }
    if (p.fault != Fault::no_barrier_before_refill) sync_block();
  }
  if (p.fault != Fault::no_last_wait) cp_async_wait<0>();
  for (int tile = 0; tile < 8; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp() * 16 + lane() / 4 + i / 2 * 8;
      const int t = p.fault == Fault::wrong_column ? lane() % 4 + 4 * (i % 2)
                                                   : 2 * (lane() % 4) + i % 2;
      const int column = first_column + tile * 8 + t;
      const int over = p.fault == Fault::tail_stored ? 1 : 0;
      if (row < p.n + over && column < p.m) p.c[int64_t{row} * p.m + column] = c[tile][i];
    }
  }
}

inline void run(const Tensor& a, const Tensor& b, const Tensor& c, Fault fault) {
  const ProductParams params{a.as<bfloat16>(),
                             b.as<bfloat16>(),
                             c.as<float>(),
                             static_cast<int>(a.size[0]),
                             static_cast<int>(b.size[0]),
                             static_cast<int>(a.size[1]),
                             fault};
  const size_t bytes = 2 * shared_bytes<bfloat16>(kStages * kTile * kDepth);
  launch(product, Grid{(params.n + kTile - 1) / kTile, (params.m + kTile - 1) / kTile}, kThreads,
         bytes, Stream{}, params, [] { return std::string("a product"); });
}

}  // namespace clipvip::faults
