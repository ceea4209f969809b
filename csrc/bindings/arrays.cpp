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

// Names and dtypes of torch, made once: a call on a small weight would spend most of its time making them.
struct Torch {
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* float32 = nullptr;
  PyObject* float64 = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    float32 = py::object(torch.attr("float32")).release().ptr();
    float64 = py::object(torch.attr("float64")).release().ptr();
  }
  static const Torch& get() {
    static const Torch* torch = new Torch;  // lives as long as the process: what it holds may not be freed at exit
    return *torch;
  }
};

py::object checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object attribute(py::handle object, PyObject* name) { return checked(PyObject_GetAttr(object.ptr(), name)); }
py::object call(py::handle object, PyObject* name) { return checked(PyObject_CallMethodNoArgs(object.ptr(), name)); }

Array from_torch(py::handle tensor, const std::string& name, bool written) {
  const Torch& torch = Torch::get();
  ACF_CHECK(attribute(tensor, torch.is_cpu).ptr() == Py_True, name,
            " must be in the memory of the CPU, got a tensor on '", std::string(py::str(tensor.attr("device"))), "'");
  Array result;
  const py::object dtype = attribute(tensor, torch.dtype);
  ACF_CHECK_TYPE(dtype.ptr() == torch.float32 || dtype.ptr() == torch.float64, name,
                 " must be float32 or float64, got ", std::string(py::str(dtype)));
  result.dtype = dtype.ptr() == torch.float32 ? DType::float32 : DType::float64;
  ACF_CHECK(call(tensor, torch.is_contiguous).ptr() == Py_True, name, " must be C-contiguous");
  ACF_CHECK(!written || attribute(tensor, torch.requires_grad).ptr() == Py_False, name,
            " is written and must not require a gradient");
  const py::object shape = attribute(tensor, torch.shape);  // a subclass of tuple
  const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
  result.shape.reserve(static_cast<std::size_t>(rank));
  for (Py_ssize_t axis = 0; axis < rank; ++axis) {
    result.shape.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis)));
  }
  result.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
  return result;
}

}  // namespace

Array as_array(py::handle object, const std::string& name, bool written) {
  if (py::isinstance<py::array>(object)) return from_numpy(py::reinterpret_borrow<py::array>(object), name, written);
  static PyObject* const kMark = PyUnicode_InternFromString("data_ptr");
  ACF_CHECK_TYPE(PyObject_HasAttr(object.ptr(), kMark) != 0, name, " must be a numpy array or a torch tensor, got ",
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
