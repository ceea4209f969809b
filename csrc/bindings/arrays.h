// Numpy arrays and torch CPU tensors as pointer, type and shape. Neither library is linked: a tensor is asked through
// its Python methods, which is as quick as converting it to an array and needs no torch at build time.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace acf::bindings {

enum class DType { float32, float64 };

// The memory of a C-contiguous float32 or float64 array; valid while the Python object lives.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;

  std::int64_t size() const {
    std::int64_t product = 1;
    for (std::int64_t extent : shape) product *= extent;
    return product;
  }
  std::int64_t bytes() const { return size() * (dtype == DType::float32 ? 4 : 8); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Throws TypeError for other objects and dtypes, std::invalid_argument for memory that is not contiguous, not on the
// CPU, or, where `written`, not writable; `name` is what the messages call the object.
Array as_array(pybind11::handle object, const std::string& name, bool written);

// "(64, 3, 3, 3)"
std::string shape_text(const std::vector<std::int64_t>& shape);

}  // namespace acf::bindings
