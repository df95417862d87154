// The Python module clipvip._C: one line an op, and what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/tensor.h"
#include "pairwise_logsumexp/op.h"
#include "proxy_attention/op.h"

namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;

namespace {

clipvip::Tensor make_tensor(uintptr_t data, int dtype, const std::vector<int64_t>& size,
                            const std::vector<int64_t>& stride) {
  clipvip::Tensor tensor;
  if (size.size() != stride.size() || size.size() > clipvip::Tensor::kMaxDims)
    throw std::invalid_argument("a tensor of at most 4 dimensions with as many strides is needed");
  tensor.data = reinterpret_cast<void*>(data);
  tensor.dtype = static_cast<clipvip::DType>(dtype);
  tensor.ndim = static_cast<int>(size.size());
  for (size_t i = 0; i < size.size(); ++i) {
    tensor.size[i] = size[i];
    tensor.stride[i] = stride[i];
  }
  return tensor;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = "g++ " __VERSION__;
  info["cpu"] = std::string(CLIPVIP_ISA_NAMES);
  info["openmp"] = _OPENMP;
  info["cuda"] = py::none();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<clipvip::Tensor>(m, "Tensor")
      .def(py::init(&make_tensor), py::arg("data"), py::arg("dtype"), py::arg("size"),
           py::arg("stride"));
  m.def("build_info", &build_info);
  m.def("cpu_capabilities", &clipvip::cpu_capabilities);
  m.def("cpu_capability",
        [] { return std::string(clipvip::cpu_capability_name(clipvip::cpu_capability())); });
  m.def("set_cpu_capability", &clipvip::set_cpu_capability, py::arg("name"));

  m.def("proxy_attention_forward", &clipvip::proxy_attention_forward_op, release_gil());
  m.def("proxy_attention_backward", &clipvip::proxy_attention_backward_op, release_gil());
  m.def("proxy_attention_workspace", &clipvip::proxy_attention_workspace);

  m.def("pairwise_logsumexp_forward", &clipvip::pairwise_logsumexp_forward_op, release_gil());
  m.def("pairwise_logsumexp_backward", &clipvip::pairwise_logsumexp_backward_op, release_gil());
}
