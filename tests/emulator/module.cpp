// The Python module _emulator: the CUDA functions of clipvip._C, run on the CPU, and the tests'
// settings and planted faults.
#include <pybind11/pybind11.h>

#include "faults.h"
#include "module.h"

namespace py = pybind11;
using clipvip::faults::Fault;

PYBIND11_MODULE(_emulator, m) {
  clipvip::register_tensor(m);
  clipvip::register_cuda(m);

  m.def(
      "configure",
      [](uint64_t seed, int max_shared_bytes, int multiprocessors) {
        clipvip::device::emulator::settings = {seed, max_shared_bytes, multiprocessors};
        clipvip::device::emulator::launches.clear();
      },
      py::arg("seed") = 0, py::arg("max_shared_bytes") = 232448, py::arg("multiprocessors") = 4);
  // (threads of a block, bytes of its shared memory) of every launch since `configure`.
  m.def("launches", [] {
    py::list found;
    for (const auto& launch : clipvip::device::emulator::launches) {
      found.append(py::make_tuple(launch.threads, launch.shared_bytes));
    }
    return found;
  });
  m.def("product", &clipvip::faults::run);
  py::enum_<Fault>(m, "Fault", py::module_local())
      .value("none", Fault::none)
      .value("no_barrier_before_use", Fault::no_barrier_before_use)
      .value("no_barrier_before_refill", Fault::no_barrier_before_refill)
      .value("no_wait", Fault::no_wait)
      .value("wait_too_short", Fault::wait_too_short)
      .value("no_last_wait", Fault::no_last_wait)
      .value("tail_stored", Fault::tail_stored)
      .value("tail_loaded", Fault::tail_loaded)
      .value("wrong_row", Fault::wrong_row)
      .value("wrong_column", Fault::wrong_column)
      .value("lane_leaves", Fault::lane_leaves)
      .value("warp_skips_barrier", Fault::warp_skips_barrier)
      .value("unwritten", Fault::unwritten)
      .value("misaligned", Fault::misaligned)
      .value("between_arrays", Fault::between_arrays);
}
