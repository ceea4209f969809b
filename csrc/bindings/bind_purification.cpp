#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/weights.h"
#include "core/check.h"
#include "purification/purification.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

using purification::Judged;
using purification::Layer;

// A layer's weight and room for its scores.
struct Scored {
  Array w;
  projection::Shape shape;
  py::array_t<double> importance, emptiness, columns, filters;

  Scored(py::handle weight, std::int64_t groups)
      : w(as_array(weight, "weight", false)),
        shape(shape_of(w, groups)),
        importance(size(projection::Structure::channel)),
        emptiness(importance.size()),
        columns(size(projection::Structure::column)),
        filters(size(projection::Structure::filter)) {}

  std::int64_t size(projection::Structure structure) const { return projection::group_count(shape, structure); }

  template <class T>
  Layer<T> layer() {
    return {w.as<T>(),
            shape,
            importance.mutable_data(),
            emptiness.mutable_data(),
            columns.mutable_data(),
            filters.mutable_data()};
  }

  py::tuple result() const { return py::make_tuple(importance, emptiness, columns, filters); }
};

template <class T>
void score(std::vector<Scored>& scored, int threads, const std::vector<std::string>& names) {
  std::vector<Layer<T>> layers;
  layers.reserve(scored.size());
  for (Scored& one : scored) layers.push_back(one.layer<T>());
  const projection::Options options = options_of(threads);
  try {
    const py::gil_scoped_release release;
    purification::scores(layers.data(), static_cast<std::int64_t>(layers.size()), options);
  } catch (const projection::NotFinite& error) {
    const auto layer = static_cast<std::size_t>(error.layer);
    rethrow(error, scored[layer].w.shape, names.empty() ? "" : " of " + names[layer]);
  }
}

// layers: (weight, groups) each. Returns (importance, emptiness, column norms, filter norms) of each.
py::list purification_scores(const std::vector<std::pair<py::object, std::int64_t>>& layers, int threads,
                             const std::vector<std::string>& names) {
  ACF_CHECK(names.empty() || names.size() == layers.size(), "names must have one name for each of the ", layers.size(),
            " layers, got ", names.size());
  std::vector<Scored> scored;
  scored.reserve(layers.size());
  for (const auto& [weight, groups] : layers) {
    scored.emplace_back(weight, groups);
    ACF_CHECK_TYPE(scored.back().w.dtype == scored[0].w.dtype, "all layers must have the same dtype");
  }
  if (!scored.empty()) {
    scored[0].w.dtype == DType::float32 ? score<float>(scored, threads, names) : score<double>(scored, threads, names);
  }
  py::list results;
  for (const Scored& one : scored) results.append(one.result());
  return results;
}

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

// A layer's scores, its ties and its limits as Python gives them, checked, and room for what stays.
struct Request {
  Doubles importance, columns, filters;
  Ints tied;
  Judged judged;
  py::array_t<bool> kept_columns, kept_filters;

  explicit Request(const py::tuple& layer)
      : importance(py::cast<Doubles>(layer[0])),
        columns(py::cast<Doubles>(layer[1])),
        filters(py::cast<Doubles>(layer[2])),
        tied(py::cast<Ints>(layer[3])),
        kept_columns(columns.size()),
        kept_filters(filters.size()) {
    ACF_CHECK(importance.size() > 0 && columns.size() % importance.size() == 0,
              "the columns must be a multiple of the channels, got ", columns.size(), " columns and ",
              importance.size(), " channels");
    ACF_CHECK(tied.size() == filters.size(), "tied must have one number for each of the ", filters.size(),
              " filters, got ", tied.size());
    const auto limits = py::cast<std::vector<double>>(layer[4]);
    ACF_CHECK(limits.size() == 4, "limits must be four numbers, got ", limits.size());
    for (const double limit : limits) ACF_CHECK(limit >= 0, "a limit must be 0 or more, got ", limit);
    judged.limits = {limits[0], limits[1], limits[2], limits[3]};
    judged.shape.rows = filters.size();
    judged.shape.columns = columns.size();
    judged.shape.taps = columns.size() / importance.size();
  }

  Judged pointers() {
    judged.importance = importance.data();
    judged.column_norms = columns.data();
    judged.filter_norms = filters.data();
    judged.tied = tied.data();
    judged.columns = reinterpret_cast<std::uint8_t*>(kept_columns.mutable_data());
    judged.filters = reinterpret_cast<std::uint8_t*>(kept_filters.mutable_data());
    return judged;
  }
};

// layers: (importance, column norms, filter norms, tied, (column, importance, emptiness, filter limit)) each. Returns
// (columns, filters) that stay, of each.
py::list purification_keep(const std::vector<py::tuple>& layers, std::int64_t groups) {
  std::vector<Request> requests;
  requests.reserve(layers.size());
  for (const py::tuple& layer : layers) {
    ACF_CHECK_TYPE(layer.size() == 5, "a layer must be (importance, columns, filters, tied, limits), got ",
                   layer.size(), " items");
    const Request& request = requests.emplace_back(layer);
    for (py::ssize_t i = 0; i < request.tied.size(); ++i) {
      ACF_CHECK(request.tied.at(i) >= -1 && request.tied.at(i) < groups, "tied must be from -1 to ", groups - 1,
                ", got ", request.tied.at(i));
    }
  }
  std::vector<Judged> judged;
  judged.reserve(requests.size());
  for (Request& request : requests) judged.push_back(request.pointers());
  {
    const py::gil_scoped_release release;
    purification::keep(judged.data(), static_cast<std::int64_t>(judged.size()), groups);
  }
  py::list results;
  for (const Request& request : requests) {
    results.append(py::make_tuple(request.kept_columns, request.kept_filters));
  }
  return results;
}

}  // namespace

void register_purification(py::module_& module) {
  module.def("purification_scores", &purification_scores, py::arg("layers"), py::arg("threads"), py::arg("names"));
  module.def("purification_keep", &purification_keep, py::arg("layers"), py::arg("groups"));
}

}  // namespace acf::bindings
