// The table of contents of the native module: version, configuration, and one register_* call per family.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace acf::bindings {
void register_conv(py::module_& module);
void register_engine(py::module_& module);
void register_projection(py::module_& module);
void register_purification(py::module_& module);
void register_training(py::module_& module);
}  // namespace acf::bindings

namespace {

std::vector<std::string_view> names(const std::vector<acf::Isa>& isas) {
  std::vector<std::string_view> result;
  for (acf::Isa isa : isas) result.push_back(acf::isa_name(isa));
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The native kernels of autocompress_fast.";
  module.attr("__version__") = ACF_VERSION;
  module.attr("compiler") = ACF_COMPILER;
  module.attr("flags") = ACF_FLAGS;

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const acf::TypeError& type_error) {
      py::set_error(PyExc_TypeError, type_error.what());
    }
  });

  module.def("compiled_isas", [] { return names(acf::compiled_isas()); });
  module.def("supported_isas", [] { return names(acf::supported_isas()); });
  module.def("active_isa", [] { return acf::isa_name(acf::active_isa()); });
  module.def("reload_isa", [] { return acf::isa_name(acf::reload_isa()); });
  module.def("hardware_threads", &acf::hardware_threads);
  acf::bindings::register_conv(module);
  acf::bindings::register_engine(module);
  acf::bindings::register_projection(module);
  acf::bindings::register_purification(module);
  acf::bindings::register_training(module);
}
