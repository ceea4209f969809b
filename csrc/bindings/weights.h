// What the bindings of all families that read weights share: shapes, options, and errors that name the place.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "projection/projection.h"

namespace acf::bindings {

// The GEMM view of a weight of rank >= 2. Throws std::invalid_argument for other ranks, an empty weight, or groups that
// do not divide the filters.
projection::Shape shape_of(const Array& weight, std::int64_t groups);

projection::Options options_of(int threads);

// Throws the ValueError "weight<owner> has 2 values that are NaN or infinite, the first at ...".
[[noreturn]] void rethrow(const projection::NotFinite& error, const std::vector<std::int64_t>& shape,
                          const std::string& owner);

// Runs body without the GIL.
template <class Body>
void unlocked(const std::vector<std::int64_t>& shape, const Body& body, const std::string& owner = "") {
  try {
    const pybind11::gil_scoped_release release;
    body();
  } catch (const projection::NotFinite& error) {
    rethrow(error, shape, owner);
  }
}

// body(float{}) or body(double{}).
template <class Body>
void with_type(DType dtype, const Body& body) {
  dtype == DType::float32 ? body(float{}) : body(double{});
}

}  // namespace acf::bindings
