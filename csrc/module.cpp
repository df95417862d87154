// The Python module clipvip._C: one line per function of an op, and what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/cpu_features.h"
#include "linear/op.h"
#include "module.h"
#include "pairwise_logsumexp/op.h"
#include "proxy_attention/op.h"
#include "resize_crop/op.h"

namespace py = pybind11;
using clipvip::release_gil;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = "g++ " __VERSION__;
  info["cpu"] = std::string(CLIPVIP_ISA_NAMES);
  info["openmp"] = _OPENMP;
#ifdef CLIPVIP_CUDA_ARCHITECTURES
  info["cuda"] = std::string(CLIPVIP_CUDA_ARCHITECTURES);
  info["nvcc"] = std::string(CLIPVIP_NVCC_VERSION);
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  clipvip::register_tensor(m);
  m.def("build_info", &build_info);
  m.def("cpu_capabilities", &clipvip::cpu_capabilities);
  m.def("cpu_capability",
        [] { return std::string(clipvip::cpu_capability_name(clipvip::cpu_capability())); });
  m.def("set_cpu_capability", &clipvip::set_cpu_capability, py::arg("name"));

  m.def("proxy_attention_forward", &clipvip::proxy_attention_forward_op, release_gil());
  m.def("proxy_attention_backward", &clipvip::proxy_attention_backward_op, release_gil());

  m.def("pairwise_logsumexp_forward", &clipvip::pairwise_logsumexp_forward_op, release_gil());
  m.def("pairwise_logsumexp_backward", &clipvip::pairwise_logsumexp_backward_op, release_gil());

  m.def("linear_forward", &clipvip::linear_forward_op, release_gil());
  m.def("linear_grad_input", &clipvip::linear_grad_input_op, release_gil());
  m.def("linear_grad_weight", &clipvip::linear_grad_weight_op, release_gil());

  m.def("resize_crop", &clipvip::resize_crop_op, release_gil());

#ifdef CLIPVIP_CUDA_ARCHITECTURES
  clipvip::register_cuda(m);
#endif
}
