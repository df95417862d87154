#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/tensor.h"
#include "module.h"

namespace py = pybind11;

namespace {

int64_t item_size(clipvip::DType dtype) {
  switch (dtype) {
    case clipvip::DType::uint8: return 1;
    case clipvip::DType::bfloat16:
    case clipvip::DType::float16:
    case clipvip::DType::uint16: return 2;
    default: return 4;
  }
}

// Makes a tensor whose first element is `offset` elements into the `bytes` of memory at `storage`.
// All of it must lie in there; nothing later checks addresses.
clipvip::Tensor make_tensor(uintptr_t storage, uint64_t bytes, uint64_t offset, int dtype,
                            const py::tuple& size, const py::tuple& stride) {
  clipvip::Tensor tensor;
  if (size.size() != stride.size() || size.size() > clipvip::Tensor::kMaxDims)
    throw std::invalid_argument("a tensor of at most 4 dimensions with as many strides is needed");
  tensor.dtype = static_cast<clipvip::DType>(dtype);
  tensor.ndim = static_cast<int>(size.size());
  const uint64_t item = static_cast<uint64_t>(item_size(tensor.dtype));
  unsigned __int128 last = offset;
  bool empty = false, backwards = false;
  for (int i = 0; i < tensor.ndim; ++i) {
    tensor.size[i] = size[i].cast<int64_t>();
    tensor.stride[i] = stride[i].cast<int64_t>();
    empty |= tensor.size[i] < 1;
    backwards |= tensor.stride[i] < 0;
    last += static_cast<unsigned __int128>(tensor.size[i] - 1) * tensor.stride[i];
  }
  if (!empty && (storage == 0 || backwards || (last + 1) * item > bytes)) {
    throw std::invalid_argument(
        "a tensor of size " + std::string(py::str(size)) + " and strides " +
        std::string(py::str(stride)) + " does not lie in the " + std::to_string(bytes) +
        " bytes of its storage; it has no memory (meta, fake, or of another transform), or its "
        "memory was freed or made smaller");
  }
  tensor.data = reinterpret_cast<void*>(storage + offset * item);
  return tensor;
}

// Makes a tensor from a torch.Tensor by calling its Python methods. It is in C++ because the same
// in Python took twice the time, and each call of an op does it several times.
clipvip::Tensor tensor_of(const py::handle& tensor, int dtype) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("untyped_storage"), PyUnicode_InternFromString("data_ptr"),
      PyUnicode_InternFromString("nbytes"), PyUnicode_InternFromString("storage_offset"),
      PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride")};
  const auto checked = [](PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  };
  const auto call = [&](const py::handle& of, int name) {
    return checked(PyObject_CallMethodNoArgs(of.ptr(), names[name]));
  };
  const py::object storage = call(tensor, 0);
  return make_tensor(call(storage, 1).cast<uintptr_t>(), call(storage, 2).cast<uint64_t>(),
                     call(tensor, 3).cast<uint64_t>(), dtype,
                     checked(PyObject_GetAttr(tensor.ptr(), names[4])), call(tensor, 5));
}

}  // namespace

void clipvip::register_tensor(py::module_& m) {
  // Local to its module, so that another one with the same class can be loaded beside it.
  py::class_<Tensor>(m, "Tensor", py::module_local())
      .def(py::init(&make_tensor), py::arg("storage"), py::arg("bytes"), py::arg("offset"),
           py::arg("dtype"), py::arg("size"), py::arg("stride"))
      .def_static("of", &tensor_of);
}
