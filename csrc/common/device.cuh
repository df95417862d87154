// Device functions beyond plain C++, and the launch from the host. All inline PTX is here, so that
// tests/emulator can define the same names for the CPU and run the kernels' own source there.
//
// Rules that keep a kernel's source fit for both: one struct of parameters by value; shared memory
// only through Shared; no lane may leave a warp while others still call shuffle, ldmatrix or mma.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clipvip::device {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// 16 bytes, the unit of all bulk memory traffic.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

struct Grid {
  int64_t x, y = 1, z = 1;  // x up to 2^31 - 1, y and z up to 65535
};

// Where to launch: the device's index and its cudaStream_t, as Python passes them.
struct Stream {
  int device;
  uintptr_t handle;
};

}  // namespace clipvip::device

#ifdef CLIPVIP_EMULATOR
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace clipvip::device {

inline __device__ int thread() { return threadIdx.x; }
inline __device__ int threads() { return blockDim.x; }
inline __device__ int lane() { return threadIdx.x & 31; }
inline __device__ int warp() { return threadIdx.x >> 5; }
inline __device__ int block_x() { return blockIdx.x; }
inline __device__ int block_y() { return blockIdx.y; }
inline __device__ int block_z() { return blockIdx.z; }

inline __device__ void sync_block() { __syncthreads(); }
inline __device__ void sync_warp() { __syncwarp(); }

// The value of the lane whose index differs in the bits of mask; every lane of the warp takes part.
template <typename T>
__device__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether the condition holds in any lane of the warp, all of which take part.
inline __device__ bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

// The block's dynamic shared memory, cut into 16-byte aligned arrays one after another. Every
// thread takes the same arrays in the same order, and the host asks for the sum of shared_bytes.
class Shared {
 public:
  __device__ Shared() {
    extern __shared__ Bytes16 memory[];
    next_ = reinterpret_cast<char*>(memory);
  }
  template <typename T>
  __device__ T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 15) / 16 * 16;
    return array;
  }

 private:
  char* next_;
};

inline __device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background, past the first level of cache;
// zeros where not valid, and then the source is not read. Both addresses are multiples of 16.
inline __device__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of this thread's copies so far.
inline __device__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are unfinished. Other threads see the bytes
// only after another barrier.
template <int pending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8×8 matrices of 16-bit elements: lanes 8i … 8i+7 give the addresses of matrix i's rows; lane
// l receives of each the elements (l/4, 2·(l%4)) and (l/4, 2·(l%4) + 1), or with transpose
// (2·(l%4), l/4) and (2·(l%4) + 1, l/4).
template <bool transpose = false>
__device__ void ldmatrix(uint32_t (&matrix)[4], const void* row) {
  if constexpr (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c [16×8] += a [16×16] · b [16×8]. With g = lane/4 and t = lane%4, lane l holds
// of c (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1);
// of a the pairs from (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8) along the row;
// of b the pairs from (2t, g) and (2t+8, g) along the column.
template <typename T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
inline __device__ void mma<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
inline __device__ void mma<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x and log2(x) in hardware: relative error about 2^-22, 2^-inf is 0, log2(0) is -inf.
inline __device__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline __device__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x in hardware: relative error about 2^-23, 1/inf is 0.
inline __device__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x·y rounded by itself, never fused with a sum that follows.
inline __device__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __device__ float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounds to the nearest, ties to even.
template <typename T>
__device__ T from_float(float x);
template <>
inline __device__ float from_float<float>(float x) {
  return x;
}
template <>
inline __device__ bfloat16 from_float<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
inline __device__ float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two 16-bit numbers in a word, the first in the low half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
inline __device__ uint32_t pack<bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
inline __device__ uint32_t pack<float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Host side ---------------------------------------------------------------------------------------

inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next call would report this one again
    throw std::runtime_error(what + ": " + cudaGetErrorString(status));
  }
}

inline int attribute(Stream stream, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, stream.device), "cannot ask the GPU what it is");
  return value;
}
// Bytes of shared memory that a block may ask for.
inline int max_shared_bytes(Stream stream) {
  return attribute(stream, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int multiprocessors(Stream stream) {
  return attribute(stream, cudaDevAttrMultiProcessorCount);
}

// Launches kernel(params) on the stream. `describe` gives the op and its shapes for the error.
template <typename Params, typename Describe>
void launch(void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes, Stream stream,
            const Params& params, Describe describe) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto checked = [&](cudaError_t status) {
    if (status != cudaSuccess) {
      check(status, describe() + ", launched as " + std::to_string(grid.x) + "x" +
                        std::to_string(grid.y) + "x" + std::to_string(grid.z) + " blocks of " +
                        std::to_string(threads) + " threads with " +
                        std::to_string(shared_bytes) + " bytes of shared memory");
    }
  };
  checked(cudaSetDevice(stream.device));
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    checked(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const dim3 blocks(grid.x, grid.y, grid.z);
  checked(cudaLaunchKernel(function, blocks, dim3(threads), arguments, shared_bytes,
                           reinterpret_cast<cudaStream_t>(stream.handle)));
}

}  // namespace clipvip::device
#endif

namespace clipvip::device {

// Bytes that one array of Shared::take occupies.
template <typename T>
constexpr size_t shared_bytes(int64_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

}  // namespace clipvip::device
