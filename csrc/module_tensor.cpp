#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "common/tensor.h"
#include "module.h"

namespace py = pybind11;

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

}  // namespace

void clipvip::register_tensor(py::module_& m) {
  // Local to its module, so that another one with the same class can be loaded beside it.
  py::class_<Tensor>(m, "Tensor", py::module_local())
      .def(py::init(&make_tensor), py::arg("data"), py::arg("dtype"), py::arg("size"),
           py::arg("stride"));
}
