// csrc/common/device.cuh on the CPU, so that a kernel's own source runs and is checked without a GPU.
//
// Every thread of a block is a fiber; blocks run one after another. The emulator detects
// - a missing barrier: warps run as far ahead of each other as barriers allow, in an order that the
//   seed decides after each barrier;
// - a missing wait: a cp.async copies when issued or only at its wait, as the seed decides, and a
//   block that ends before the last wait is an error;
// - shared memory read before it is written: it holds NaN (all bits set) when a block starts;
// - a wrong fragment: shuffle, ldmatrix and mma work on the lanes' true layouts;
// - diverging lanes: a warp whose lanes meet at different instructions, or not at all, is an error;
// - addresses: alignment and shared bounds always, everything else under the address sanitizer,
//   which also finds gaps between the arrays of Shared.
// It does not model bank conflicts or timing, nor find races outside the schedules that it tries.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace clipvip::device {

using std::max;
using std::min;

namespace emulator {

// Settings of a test. Seed 0 runs threads in order and copies at the wait; seed 1 runs them backwards
// and copies at once; with other seeds both are random.
struct Settings {
  uint64_t seed = 0;
  int max_shared_bytes = 232448;
  int multiprocessors = 4;
};
inline Settings settings;

// Launches since the settings last changed.
struct Launch {
  int threads;
  size_t shared_bytes;
};
inline std::vector<Launch> launches;

struct Copy {
  char* shared;
  const void* global;  // nullptr: zeros
  bool landed;         // when it was issued
};

struct Fiber {
  void* stack_pointer = nullptr;
  const char* waits_at = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t runnable = 0;  // a bit for each lane
  int arrived = 0;
  bool backwards = false;
  const char* instruction = nullptr;
  void* arguments[32] = {};
};

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096, kRedZone = 32, kMaxArrays = 64;

// The running block.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;  // of the warps: the first that can run does
  std::vector<char*> stacks;
  std::mt19937_64 random;
  void* host_stack_pointer = nullptr;
  int current = 0, threads = 0, at_barrier = 0, finished = 0;
  int64_t block[3] = {};
  char* shared = nullptr;
  size_t shared_bytes = 0, shared_capacity = 0;
  void (*body)(const Machine&) = nullptr;
  void (*kernel)() = nullptr;
  const void* params = nullptr;
  std::string error;
};
inline Machine machine;

// Saves the registers that a call must keep, and continues where `to` stopped.
__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void switch_stack(
    void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline Fiber& current() { return machine.fibers[machine.current]; }

inline void to_host() { switch_stack(&current().stack_pointer, machine.host_stack_pointer); }

// The message of an error in a thread of the running block.
inline std::string error_in(int thread, const std::string& what) {
  return what + " (thread " + std::to_string(thread) + " of block " +
         std::to_string(machine.block[0]) + "," + std::to_string(machine.block[1]) + "," +
         std::to_string(machine.block[2]) + ")";
}

// Ends the launch with an error; the fibers are never resumed.
[[noreturn]] inline void fail(const std::string& what) {
  machine.error = error_in(machine.current, what);
  to_host();
  std::abort();
}

inline std::string where_everyone_is() {
  std::string text = "no thread can go on";
  for (int i = 0; i < machine.threads; ++i) {
    const char* place = machine.fibers[i].waits_at;
    if (i % 32 != 0 && place == machine.fibers[i - 1].waits_at) continue;
    text += "; warp " + std::to_string(i / 32) + " from lane " + std::to_string(i % 32) + " at " +
            place;
  }
  return text;
}

// Runs other threads until this one can continue.
inline void yield() {
  void** from = &current().stack_pointer;
  for (int index : machine.order) {
    const Warp& warp = machine.warps[index];
    if (warp.runnable == 0) continue;
    const int lane =
        warp.backwards ? 31 - __builtin_clz(warp.runnable) : __builtin_ctz(warp.runnable);
    const int next = index * 32 + lane;
    if (next == machine.current) return;
    machine.current = next;
    switch_stack(from, machine.fibers[next].stack_pointer);
    return;
  }
  if (machine.finished < machine.threads) fail(where_everyone_is());
  to_host();
}

inline void draw_schedule() {
  const uint64_t seed = settings.seed;
  for (Warp& warp : machine.warps) warp.backwards = seed < 2 ? seed == 1 : machine.random() & 1;
  std::iota(machine.order.begin(), machine.order.end(), 0);
  if (seed == 1) std::reverse(machine.order.begin(), machine.order.end());
  if (seed > 1) std::shuffle(machine.order.begin(), machine.order.end(), machine.random);
}

// Waits until every lane of the warp is at the same instruction; the last to arrive runs `combine`
// on the values of all.
template <typename Combine>
void collective(const char* instruction, void* argument, Combine combine) {
  const int lane = machine.current % 32;
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.arrived > 0 && std::strcmp(warp.instruction, instruction) != 0) {
    fail(std::string("lanes of one warp meet at ") + warp.instruction + " and " + instruction);
  }
  warp.instruction = current().waits_at = instruction;
  warp.arguments[lane] = argument;
  if (++warp.arrived == 32) {
    combine(warp.arguments);
    warp.arrived = 0;
    warp.runnable = ~0u;
  } else {
    warp.runnable &= ~(1u << lane);
    yield();
  }
}

inline void run_thread() {
  machine.body(machine);
  current().waits_at = "the end";
  ++machine.finished;
  machine.warps[machine.current / 32].runnable &= ~(1u << machine.current % 32);
  yield();
}

inline void check_shared(const void* pointer, const char* what) {
  const char* address = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(std::string(what) + ": a shared address is not a multiple of 16");
  }
  if (address < machine.shared || address + 16 > machine.shared + machine.shared_capacity) {
    fail(std::string(what) + ": an address outside the block's shared memory");
  }
}

inline void land(const Copy& copy) {
  if (copy.landed) return;
  if (copy.global) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

inline void prepare_block(int threads) {
  machine.threads = threads;
  machine.at_barrier = machine.finished = 0;
  ASAN_UNPOISON_MEMORY_REGION(machine.shared, machine.shared_capacity);
  std::memset(machine.shared, 0xff, machine.shared_capacity);
  machine.fibers.assign(threads, Fiber{});
  machine.warps.assign(threads / 32, Warp{});
  machine.order.resize(threads / 32);
  while (static_cast<int>(machine.stacks.size()) < threads) {
    void* stack = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for a thread's stack");
    mprotect(stack, kGuardBytes, PROT_NONE);  // so that a stack overflow is noticed
    machine.stacks.push_back(static_cast<char*>(stack) + kGuardBytes);
  }
  for (int i = 0; i < threads; ++i) {
    char* stack = machine.stacks[i];
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&run_thread);
    machine.fibers[i].stack_pointer = top - 8;  // below it, the six registers of switch_stack
    machine.warps[i / 32].runnable |= 1u << i % 32;
  }
  draw_schedule();
}

inline void run_block() {
  const int first = machine.order[0];
  machine.current = first * 32 + (machine.warps[first].backwards ? 31 : 0);
  machine.error.clear();
  switch_stack(&machine.host_stack_pointer, current().stack_pointer);
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
  for (int i = 0; i < machine.threads; ++i) {
    bool unfinished = !machine.fibers[i].open.empty();
    for (const auto& group : machine.fibers[i].groups) unfinished |= !group.empty();
    if (unfinished) {
      throw std::runtime_error(error_in(i, "a thread ends with unfinished cp.async groups"));
    }
  }
}

}  // namespace emulator

inline int thread() { return emulator::machine.current; }
inline int threads() { return emulator::machine.threads; }
inline int lane() { return emulator::machine.current % 32; }
inline int warp() { return emulator::machine.current / 32; }
inline int block_x() { return static_cast<int>(emulator::machine.block[0]); }
inline int block_y() { return static_cast<int>(emulator::machine.block[1]); }
inline int block_z() { return static_cast<int>(emulator::machine.block[2]); }

inline void sync_warp() {
  emulator::collective("a warp's barrier", nullptr, [](void**) {});
}

inline void sync_block() {
  using emulator::machine;
  emulator::current().waits_at = "the block's barrier";
  machine.warps[machine.current / 32].runnable &= ~(1u << machine.current % 32);
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    for (emulator::Warp& warp : machine.warps) warp.runnable = ~0u;
    emulator::draw_schedule();
  }
  emulator::yield();
}

template <typename T>
T shuffle_xor(T value, int mask) {
  struct Argument {
    T value, result;
    int mask;
  } argument{value, value, mask};
  emulator::collective("shuffle", &argument, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Argument& mine = *static_cast<Argument*>(lanes[i]);
      mine.result = static_cast<Argument*>(lanes[(i ^ mine.mask) & 31])->value;
    }
  });
  return argument.result;
}

inline bool any_lane(bool condition) {
  struct Argument {
    bool condition, result;
  } argument{condition, false};
  emulator::collective("a vote", &argument, [](void** lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= static_cast<Argument*>(lanes[i])->condition;
    for (int i = 0; i < 32; ++i) static_cast<Argument*>(lanes[i])->result = any;
  });
  return argument.result;
}

class Shared {
 public:
  template <typename T>
  T* take(int64_t count) {
    using emulator::machine;
    const size_t used = count * sizeof(T), bytes = (used + 15) / 16 * 16;
    taken_ += bytes;
    if (taken_ > machine.shared_bytes || ++arrays_ > emulator::kMaxArrays) {
      emulator::fail("the kernel takes " + std::to_string(taken_) + " bytes of shared memory in " +
                     std::to_string(arrays_) + " arrays, launched with " +
                     std::to_string(machine.shared_bytes) + " for at most " +
                     std::to_string(emulator::kMaxArrays));
    }
    char* array = machine.shared + offset_;
    offset_ += bytes + emulator::kRedZone;
    ASAN_POISON_MEMORY_REGION(array + used, bytes + emulator::kRedZone - used);
    return reinterpret_cast<T*>(array);
  }

 private:
  size_t taken_ = 0, offset_ = 0, arrays_ = 0;
};

inline void cp_async16(void* shared, const void* global, bool valid) {
  emulator::check_shared(shared, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("cp.async: a global address is not a multiple of 16");
  }
  emulator::Copy copy{static_cast<char*>(shared), valid ? global : nullptr, false};
  const uint64_t seed = emulator::settings.seed;
  if (seed == 1 || (seed > 1 && (emulator::machine.random() & 1))) {
    emulator::land(copy);
    copy.landed = true;
  }
  emulator::current().open.push_back(copy);
}

inline void cp_async_commit() {
  emulator::Fiber& self = emulator::current();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int pending>
void cp_async_wait() {
  auto& groups = emulator::current().groups;
  while (groups.size() > pending) {
    for (const emulator::Copy& copy : groups.front()) emulator::land(copy);
    groups.pop_front();
  }
}

template <bool transpose = false>
void ldmatrix(uint32_t (&matrix)[4], const void* row) {
  emulator::check_shared(row, "ldmatrix");
  struct Argument {
    uint32_t* matrix;
    const void* row;
  } argument{matrix, row};
  emulator::collective(transpose ? "ldmatrix.trans" : "ldmatrix", &argument, [](void** lanes) {
    for (int m = 0; m < 4; ++m) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) {
        std::memcpy(element[i], static_cast<Argument*>(lanes[8 * m + i])->row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint32_t low = transpose ? element[j][i] : element[i][j];
        const uint32_t high = transpose ? element[j + 1][i] : element[i][j + 1];
        static_cast<Argument*>(lanes[lane])->matrix[m] = high << 16 | low;
      }
    }
  });
}

inline float rounded_product(float x, float y) { return x * y; }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(float16 x) {
  _Float16 y;
  std::memcpy(&y, &x.bits, 2);
  return static_cast<float>(y);
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  float16 z;
  std::memcpy(&z.bits, &y, 2);
  return z;
}

template <typename T>
uint32_t pack(float low, float high) {
  return uint32_t{from_float<T>(high).bits} << 16 | from_float<T>(low).bits;
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument{c, a, {b0, b1}};
  emulator::collective("mma", &argument, [](void** lanes) {
    const auto unpack = [](uint32_t word, float* pair) {
      pair[0] = to_float(T{static_cast<uint16_t>(word)});
      pair[1] = to_float(T{static_cast<uint16_t>(word >> 16)});
    };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Argument& mine = *static_cast<Argument*>(lanes[lane]);
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) unpack(mine.a[i], &left[g + 8 * (i % 2)][t + 8 * (i / 2)]);
      for (int i = 0; i < 2; ++i) {
        float pair[2];
        unpack(mine.b[i], pair);
        right[t + 8 * i][g] = pair[0];
        right[t + 8 * i + 1][g] = pair[1];
      }
    }
    float sum[16][8] = {};
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* mine = static_cast<Argument*>(lanes[lane])->c;
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) mine[i] += sum[g + 8 * (i / 2)][t + i % 2];
    }
  });
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;  // the hardware flushes these; NaN stays
}
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) {
  const float y = 1 / x;
  return std::fabs(y) < std::numeric_limits<float>::min() ? std::copysign(0.f, y) : y;
}

inline int max_shared_bytes(Stream) { return emulator::settings.max_shared_bytes; }
inline int multiprocessors(Stream) { return emulator::settings.multiprocessors; }

template <typename Params, typename Describe>
void launch(void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes, Stream,
            const Params& params, Describe describe) {
  using emulator::machine;
  using emulator::settings;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x >= int64_t{1} << 31 || grid.y > 65535 || grid.z > 65535 || threads % 32 != 0 ||
      threads < 32 || threads > 1024 ||
      shared_bytes > static_cast<size_t>(settings.max_shared_bytes)) {
    throw std::runtime_error(describe() + ": no GPU takes such a launch");
  }
  emulator::launches.push_back({threads, shared_bytes});
  machine.random.seed(settings.seed);
  machine.shared_bytes = shared_bytes;
  machine.shared_capacity = shared_bytes + emulator::kMaxArrays * emulator::kRedZone;
  const std::unique_ptr<char, decltype(&std::free)> shared(
      static_cast<char*>(std::aligned_alloc(128, (machine.shared_capacity + 127) / 128 * 128)),
      &std::free);
  machine.shared = shared.get();
  machine.kernel = reinterpret_cast<void (*)()>(kernel);
  machine.params = &params;
  machine.body = [](const emulator::Machine& block) {
    reinterpret_cast<void (*)(Params)>(block.kernel)(*static_cast<const Params*>(block.params));
  };
  std::vector<int64_t> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  if (settings.seed == 1) std::reverse(blocks.begin(), blocks.end());
  if (settings.seed > 1) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  std::string error;
  try {
    for (int64_t block : blocks) {
      machine.block[0] = block % grid.x;
      machine.block[1] = block / grid.x % grid.y;
      machine.block[2] = block / grid.x / grid.y;
      emulator::prepare_block(threads);
      emulator::run_block();
    }
  } catch (const std::runtime_error& caught) {
    error = caught.what();
  }
  ASAN_UNPOISON_MEMORY_REGION(machine.shared, machine.shared_capacity);
  if (!error.empty()) throw std::runtime_error(describe() + ": " + error);
}

}  // namespace clipvip::device
