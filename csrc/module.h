// What the Python modules with ops are put together from.
#pragma once

#include <pybind11/pybind11.h>

namespace clipvip {

using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

// The class Tensor: how Python hands over memory.
void register_tensor(pybind11::module_& m);
// The ops' CUDA kernels, their names ending in _cuda.
void register_cuda(pybind11::module_& m);

}  // namespace clipvip
