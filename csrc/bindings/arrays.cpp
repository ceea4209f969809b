#include "bindings/arrays.h"

#include "core/check.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

Array from_numpy(const py::array& array, const std::string& name, bool written) {
  Array result;
  // isinstance of array_t compares dtypes, byte order included.
  if (py::isinstance<py::array_t<float>>(array)) {
    result.dtype = DType::float32;
  } else {
    ACF_CHECK_TYPE(py::isinstance<py::array_t<double>>(array), name, " must be float32 or float64, got ",
                   std::string(py::str(array.dtype())));
    result.dtype = DType::float64;
  }
  ACF_CHECK((array.flags() & py::array::c_style) != 0, name, " must be C-contiguous");
  ACF_CHECK(!written || array.writeable(), name, " must be writable");
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) result.shape.push_back(array.shape(axis));
  result.data = const_cast<void*>(array.data());
  return result;
}

Array from_torch(py::handle tensor, const std::string& name, bool written) {
  ACF_CHECK(py::cast<bool>(tensor.attr("is_cpu")), name, " must be in the memory of the CPU, got a tensor on '",
            std::string(py::str(tensor.attr("device"))), "'");
  Array result;
  const int bytes = py::cast<int>(tensor.attr("element_size")());
  ACF_CHECK_TYPE(py::cast<bool>(tensor.attr("is_floating_point")()) && (bytes == 4 || bytes == 8), name,
                 " must be float32 or float64, got ", std::string(py::str(tensor.attr("dtype"))));
  result.dtype = bytes == 4 ? DType::float32 : DType::float64;
  ACF_CHECK(py::cast<bool>(tensor.attr("is_contiguous")()), name, " must be C-contiguous");
  ACF_CHECK(!written || !py::cast<bool>(tensor.attr("requires_grad")), name,
            " is written and must not require a gradient");
  const py::tuple shape = tensor.attr("shape");
  for (py::handle extent : shape) result.shape.push_back(py::cast<std::int64_t>(extent));
  result.data = reinterpret_cast<void*>(py::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
  return result;
}

}  // namespace

Array as_array(py::handle object, const std::string& name, bool written) {
  if (py::isinstance<py::array>(object)) return from_numpy(py::reinterpret_borrow<py::array>(object), name, written);
  ACF_CHECK_TYPE(py::hasattr(object, "data_ptr"), name, " must be a numpy array or a torch tensor, got ",
                 type_name(object));
  return from_torch(object, name, written);
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace acf::bindings
