// What the Python modules with ops are put together from.
//
// A function of an op takes, in this order: what the op is given and what it writes to; where it
// runs, which is the number of threads, or in a function whose name ends in _cuda a device and its
// stream; and the address of its workspace, or 0. It returns 0 when it has run. When it needs a
// workspace and was given none, it does nothing and returns how many bytes it needs.
#pragma once

#include <pybind11/pybind11.h>

namespace clipvip {

using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

// Registers the class Tensor, as which Python passes memory.
void register_tensor(pybind11::module_& m);
// Registers the ops' CUDA functions, whose names end in _cuda.
void register_cuda(pybind11::module_& m);

}  // namespace clipvip
