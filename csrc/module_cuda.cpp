// The CUDA part of the Python module: one line per function.
#include "elementwise/cuda.h"
#include "module.h"
#include "pairwise_logsumexp/cuda.h"
#include "proxy_attention/cuda.h"

void clipvip::register_cuda(pybind11::module_& m) {
  m.def("elementwise_add_norm_cuda", &elementwise_add_norm_cuda, release_gil());
  m.def("elementwise_add_norm_backward_cuda", &elementwise_add_norm_backward_cuda, release_gil());
  m.def("elementwise_add_cuda", &elementwise_add_cuda, release_gil());
  m.def("elementwise_cast_and_sum_cuda", &elementwise_cast_and_sum_cuda, release_gil());
  m.def("elementwise_quick_gelu_cuda", &elementwise_quick_gelu_cuda, release_gil());
  m.def("elementwise_quick_gelu_backward_cuda", &elementwise_quick_gelu_backward_cuda, release_gil());
  m.def("pairwise_logsumexp_forward_cuda", &pairwise_logsumexp_forward_cuda, release_gil());
  m.def("pairwise_logsumexp_weigh_cuda", &pairwise_logsumexp_weigh_cuda, release_gil());
  m.def("pairwise_logsumexp_panel_cuda", &pairwise_logsumexp_panel_cuda, release_gil());
  m.def("proxy_attention_forward_cuda", &proxy_attention_forward_cuda, release_gil());
  m.def("proxy_attention_backward_cuda", &proxy_attention_backward_cuda, release_gil());
}
