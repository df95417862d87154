// The CUDA side of the Python module: one line an op.
#include <pybind11/stl.h>

#include "module.h"
#include "pairwise_logsumexp/cuda.h"

void clipvip::register_cuda(pybind11::module_& m) {
  m.def("pairwise_logsumexp_forward_cuda", &pairwise_logsumexp_forward_cuda, release_gil());
  m.def("pairwise_logsumexp_weigh_cuda", &pairwise_logsumexp_weigh_cuda, release_gil());
  m.def("pairwise_logsumexp_panel_cuda", &pairwise_logsumexp_panel_cuda, release_gil());
}
