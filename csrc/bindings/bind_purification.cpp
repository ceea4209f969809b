#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/weights.h"
#include "purification/purification.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

// (importance, emptiness, column norms, filter norms)
py::tuple purification_scores(py::handle weight, std::int64_t groups, int threads) {
  const Array w = as_array(weight, "weight", false);
  const projection::Shape shape = shape_of(w, groups);
  const projection::Options options = options_of(threads);
  const auto size = [&shape](projection::Structure structure) { return projection::group_count(shape, structure); };
  py::array_t<double> importance(size(projection::Structure::channel)), emptiness(importance.size());
  py::array_t<double> columns(size(projection::Structure::column)), filters(size(projection::Structure::filter));
  double* const results[] = {importance.mutable_data(), emptiness.mutable_data(), columns.mutable_data(),
                             filters.mutable_data()};
  unlocked(w.shape, [&] {
    with_type(w.dtype, [&](auto zero) {
      purification::scores(w.as<decltype(zero)>(), shape, options, results[0], results[1], results[2], results[3]);
    });
  });
  return py::make_tuple(importance, emptiness, columns, filters);
}

}  // namespace

void register_purification(py::module_& module) {
  module.def("purification_scores", &purification_scores, py::arg("weight"), py::arg("groups"), py::arg("threads"));
}

}  // namespace acf::bindings
