// ops.py documents what these functions mean; here arguments are checked and the GIL is released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/weights.h"
#include "core/check.h"
#include "projection/projection.h"

namespace py = pybind11;

namespace acf::bindings {

using projection::Layer;
using projection::NotFinite;
using projection::Options;
using projection::Shape;
using projection::Structure;

namespace {

const std::string kWeight = "weight", kZ = "z", kU = "u";

Structure structure_of(std::string_view name, bool with_joint) {
  if (name == "filter") return Structure::filter;
  if (name == "channel") return Structure::channel;
  if (name == "column") return Structure::column;
  if (name == "element") return Structure::element;
  if (with_joint && name == "filter+column") return Structure::filter_and_column;
  ACF_CHECK(false, "structure must be one of filter, channel, column, element", with_joint ? ", filter+column" : "",
            ", got '", name, "'");
  return Structure::filter;
}

std::int64_t checked_keep(py::handle keep, std::int64_t groups, const char* name, const char* of) {
  ACF_CHECK_TYPE(PyIndex_Check(keep.ptr()) != 0 && !PyBool_Check(keep.ptr()), name, " must be an integer, got ",
                 std::string(py::repr(keep)));
  const auto value = py::cast<std::int64_t>(py::reinterpret_steal<py::object>(PyNumber_Index(keep.ptr())));
  ACF_CHECK(value >= 0 && value <= groups, name, " must be between 0 and the ", groups, " ", of,
            "s of the weight, got ", value);
  return value;
}

// The two counts of filter+column, or one and 0.
std::pair<std::int64_t, std::int64_t> keeps(py::handle keep, const Shape& shape, Structure structure,
                                            std::string_view structure_name) {
  if (structure != Structure::filter_and_column) {
    const std::int64_t groups = projection::group_count(shape, structure);
    return {checked_keep(keep, groups, "keep", std::string(structure_name).c_str()), 0};
  }
  ACF_CHECK_TYPE(py::isinstance<py::sequence>(keep) && py::len(keep) == 2,
                 "keep of filter+column must be the pair (filters, columns), got ", std::string(py::repr(keep)));
  const auto pair = py::reinterpret_borrow<py::sequence>(keep);
  return {checked_keep(pair[0], shape.rows, "filters", "filter"),
          checked_keep(pair[1], shape.groups * shape.columns, "columns", "column")};
}

void check_same(const Array& array, const Array& weight, const std::string& name) {
  ACF_CHECK_TYPE(array.dtype == weight.dtype, name, " must have the dtype of the weight");
  ACF_CHECK(array.shape == weight.shape, name, " must have the shape of the weight, ", shape_text(weight.shape),
            ", got ", shape_text(array.shape));
}

struct Range {
  const char* begin;
  const char* end;
  bool written;
  const std::string* name;
};

Range range_of(const Array& array, bool written, const std::string& name) {
  const char* begin = static_cast<const char*>(array.data);
  return {begin, begin + array.bytes(), written, &name};
}

// What is written may share memory with nothing else.
void check_apart(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range* last = nullptr;          // reaching furthest so far
  const Range* last_written = nullptr;  // the same among those written
  for (const Range& range : ranges) {
    const Range* other = range.written ? last : last_written;
    ACF_CHECK(other == nullptr || range.begin >= other->end, *range.name, " and ", *other->name,
              " must not overlap in memory");
    if (last == nullptr || range.end > last->end) last = &range;
    if (range.written && (last_written == nullptr || range.end > last_written->end)) last_written = &range;
  }
}

py::array_t<double> group_norms(py::handle weight, std::string_view structure_name, std::int64_t groups, int threads) {
  const Structure structure = structure_of(structure_name, false);
  const Array w = as_array(weight, "weight", false);
  const Shape shape = shape_of(w, groups);
  const Options options = options_of(threads);
  py::array_t<double> norms(projection::group_count(shape, structure));
  double* result = norms.mutable_data();
  unlocked(w.shape, [&] {
    with_type(w.dtype,
              [&](auto zero) { projection::group_norms(w.as<decltype(zero)>(), shape, structure, options, result); });
  });
  return norms;
}

void project(py::handle weight, py::handle out, std::string_view structure_name, py::handle keep, std::int64_t groups,
             int threads) {
  static const std::string kOut = "out";
  const Structure structure = structure_of(structure_name, true);
  const Array w = as_array(weight, kWeight, false), result = as_array(out, kOut, true);
  const Shape shape = shape_of(w, groups);
  check_same(result, w, kOut);
  const auto counts = keeps(keep, shape, structure, structure_name);
  if (result.data != w.data) {
    std::vector<Range> ranges = {range_of(w, false, kWeight), range_of(result, true, kOut)};
    check_apart(ranges);
  }
  const Options options = options_of(threads);
  unlocked(w.shape, [&] {
    with_type(w.dtype, [&](auto zero) {
      using T = decltype(zero);
      projection::project(w.as<T>(), result.as<T>(), shape, structure, counts.first, counts.second, options);
    });
  });
}

// An update as Python gives it, checked.
struct Request {
  Array w, z, u;
  Shape shape;
  Structure structure = Structure::filter;
  std::pair<std::int64_t, std::int64_t> keep;

  Request(py::handle weight, py::handle z_, py::handle u_, std::string_view structure_name, py::handle keep_,
          std::int64_t groups)
      : w(as_array(weight, kWeight, false)), z(as_array(z_, kZ, true)), u(as_array(u_, kU, true)) {
    check_same(z, w, kZ);
    check_same(u, w, kU);
    shape = shape_of(w, groups);
    structure = structure_of(structure_name, true);
    keep = keeps(keep_, shape, structure, structure_name);
  }

  template <class T>
  Layer<T> layer() const {
    Layer<T> result;
    result.w = w.as<T>();
    result.z = z.as<T>();
    result.u = u.as<T>();
    result.shape = shape;
    result.structure = structure;
    result.keep = keep.first;
    result.keep_columns = keep.second;
    return result;
  }
};

void check_apart(const std::vector<Request>& requests) {
  std::vector<Range> ranges;
  ranges.reserve(3 * requests.size());
  for (const Request& request : requests) {
    ranges.push_back(range_of(request.w, false, kWeight));
    ranges.push_back(range_of(request.z, true, kZ));
    ranges.push_back(range_of(request.u, true, kU));
  }
  check_apart(ranges);
}

using Residuals = std::pair<double, double>;

template <class T>
std::vector<Residuals> update(const std::vector<Request>& requests, const Options& options,
                              const std::vector<std::string>& names) {
  std::vector<Layer<T>> layers;
  layers.reserve(requests.size());
  for (const Request& request : requests) layers.push_back(request.layer<T>());
  try {
    const py::gil_scoped_release release;
    projection::admm_update(layers.data(), static_cast<std::int64_t>(layers.size()), options);
  } catch (const NotFinite& error) {
    const auto layer = static_cast<std::size_t>(error.layer);
    rethrow(error, requests[layer].w.shape, names.empty() ? "" : " of " + names[layer]);
  }
  std::vector<Residuals> residuals;
  residuals.reserve(layers.size());
  for (const Layer<T>& layer : layers) residuals.emplace_back(std::sqrt(layer.primal), std::sqrt(layer.dual));
  return residuals;
}

std::vector<Residuals> update(const std::vector<Request>& requests, int threads,
                              const std::vector<std::string>& names) {
  check_apart(requests);
  const Options options = options_of(threads);
  if (requests.empty()) return {};
  return requests[0].w.dtype == DType::float32 ? update<float>(requests, options, names)
                                               : update<double>(requests, options, names);
}

Residuals admm_update(py::handle weight, py::handle z, py::handle u, std::string_view structure, py::handle keep,
                      std::int64_t groups, int threads) {
  std::vector<Request> requests;
  requests.emplace_back(weight, z, u, structure, keep, groups);
  return update(requests, threads, {})[0];
}

// layers: (weight, z, u, structure, keep, groups) each.
std::vector<Residuals> admm_update_all(const std::vector<py::tuple>& layers, int threads,
                                       const std::vector<std::string>& names) {
  ACF_CHECK(names.empty() || names.size() == layers.size(), "names must have one name for each of the ", layers.size(),
            " layers, got ", names.size());
  std::vector<Request> requests;
  requests.reserve(layers.size());
  for (const py::tuple& layer : layers) {
    ACF_CHECK_TYPE(layer.size() == 6, "a layer must be (weight, z, u, structure, keep, groups), got ", layer.size(),
                   " items");
    requests.emplace_back(layer[0], layer[1], layer[2], py::cast<std::string>(layer[3]), layer[4],
                          py::cast<std::int64_t>(layer[5]));
    ACF_CHECK_TYPE(requests.back().w.dtype == requests[0].w.dtype, "all layers must have the same dtype");
  }
  return update(requests, threads, names);
}

using Levels = py::array_t<double, py::array::c_style | py::array::forcecast>;

void check_levels(const Levels& levels) {
  ACF_CHECK(levels.ndim() == 1 && levels.size() >= 1 && levels.size() <= 32768,
            "levels must be 1-dimensional with 1 to 32768 values, got ", levels.size(), " in ", levels.ndim(),
            " dimensions");
  for (py::ssize_t i = 0; i < levels.size(); ++i) {
    ACF_CHECK(std::isfinite(levels.at(i)), "levels must be finite, got ", levels.at(i), " at index ", i);
    ACF_CHECK(i == 0 || levels.at(i) > levels.at(i - 1), "levels must ascend, got ", levels.at(i), " after ",
              levels.at(i - 1), " at index ", i);
  }
}

// The best scale, and whether it is proven to be the best.
std::pair<double, bool> best_scale(py::handle weight, const Levels& levels) {
  const Array w = as_array(weight, "weight", false);
  check_levels(levels);
  const double* level = levels.data();
  const std::int64_t count = levels.size();
  double scale = 0;
  bool exact = false;
  unlocked(w.shape, [&] {
    with_type(w.dtype, [&](auto zero) {
      scale = projection::best_scale(w.as<decltype(zero)>(), w.size(), level, count, &exact);
    });
  });
  return {scale, exact};
}

template <class Code>
void levels_as(const Array& w, const Levels& levels, double scale, const Options& options, const Array& values,
               py::array codes) {
  ACF_CHECK(codes.size() == w.size() && (codes.flags() & py::array::c_style) != 0 && codes.writeable(),
            "codes must be writable, C-contiguous and as many as the weights");
  auto* code = static_cast<Code*>(codes.mutable_data());
  const double* level = levels.data();
  const std::int64_t count = levels.size();
  unlocked(w.shape, [&] {
    with_type(w.dtype, [&](auto zero) {
      using T = decltype(zero);
      projection::project_levels(w.as<T>(), w.size(), level, count, scale, options, values.as<T>(), code);
    });
  });
}

void project_levels(py::handle weight, const Levels& levels, double scale, py::handle values, const py::array& codes,
                    int threads) {
  const Array w = as_array(weight, "weight", false), result = as_array(values, "values", true);
  check_levels(levels);
  check_same(result, w, "values");
  ACF_CHECK(std::isfinite(scale) && scale >= 0, "scale must be finite and not negative, got ", scale);
  const Options options = options_of(threads);
  if (py::isinstance<py::array_t<std::int8_t>>(codes) && levels.size() <= 128) {
    levels_as<std::int8_t>(w, levels, scale, options, result, codes);
  } else {
    ACF_CHECK_TYPE(py::isinstance<py::array_t<std::int16_t>>(codes),
                   "codes must be int8 (for up to 128 levels) or int16, got ", std::string(py::str(codes.dtype())));
    levels_as<std::int16_t>(w, levels, scale, options, result, codes);
  }
}

}  // namespace

void register_projection(py::module_& module) {
  module.def("group_norms", &group_norms, py::arg("weight"), py::arg("structure"), py::arg("groups"),
             py::arg("threads"));
  module.def("project", &project, py::arg("weight"), py::arg("out"), py::arg("structure"), py::arg("keep"),
             py::arg("groups"), py::arg("threads"));
  module.def("admm_update", &admm_update, py::arg("weight"), py::arg("z"), py::arg("u"), py::arg("structure"),
             py::arg("keep"), py::arg("groups"), py::arg("threads"));
  module.def("admm_update_all", &admm_update_all, py::arg("layers"), py::arg("threads"), py::arg("names"));
  module.def("best_scale", &best_scale, py::arg("weight"), py::arg("levels"));
  module.def("project_levels", &project_levels, py::arg("weight"), py::arg("levels"), py::arg("scale"),
             py::arg("values"), py::arg("codes"), py::arg("threads"));
}

}  // namespace acf::bindings
