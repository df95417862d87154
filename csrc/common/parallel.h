// Loops over independent pieces of work on OpenMP threads.
#pragma once

#include <omp.h>

#include <cstdint>

namespace clipvip {

// Calls body(i, thread) for i in [0, count); free threads take the next piece. `body`
// must be a lambda written inside the namespace of an instruction set: its type then makes this
// instance unique to that set.
template <typename Body>
inline void parallel_for(int64_t count, int threads, const Body& body) {
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
}

}  // namespace clipvip
