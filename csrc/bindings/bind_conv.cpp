#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/activations.h"
#include "bindings/arrays.h"
#include "conv/conv.h"
#include "core/check.h"
#include "core/memory.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

using conv::Layout;
using conv::Method;

constexpr std::pair<const char*, std::optional<Method>> kMethods[] = {
    {"auto", std::nullopt},
    {"pixels_in_lanes", Method::pixels_in_lanes},
    {"filters_in_lanes", Method::filters_in_lanes},
    {"winograd_tiles_in_lanes", Method::winograd_tiles_in_lanes},
    {"winograd_filters_in_lanes", Method::winograd_filters_in_lanes},
};

const float* floats(py::handle object, const std::string& name, const std::vector<std::int64_t>& shape) {
  const Array array = as_array(object, name, false);
  ACF_CHECK_TYPE(array.dtype == DType::float32, name, " must be float32, got float64");
  ACF_CHECK(array.shape == shape, name, " must have the shape ", shape_text(shape), ", got ", shape_text(array.shape));
  return array.as<float>();
}

void check_columns(const std::vector<std::int64_t>& columns, std::int64_t count) {
  std::int64_t before = -1;
  for (const std::int64_t column : columns) {
    ACF_CHECK(column > before && column < count, "columns must be ascending numbers from 0 to ", count - 1, ", got ",
              column, before < 0 ? "" : " after " + std::to_string(before));
    before = column;
  }
}

// A tensor in the layout of the kernels.
class Planes {
 public:
  Planes(std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
         const conv::Padding& padding)
      : images_(images),
        channels_(channels),
        height_(height),
        width_(width),
        layout_(conv::layout(images, channels, height, width, padding)),
        memory_(static_cast<std::size_t>(layout_.size)) {}

  const conv::Pitch& pitch() const { return layout_.pitch; }
  float* data() { return memory_.data() + layout_.before; }

  void read(const float* from) {
    each_row([&from, this](float* row) {
      std::copy_n(from, width_, row);
      from += width_;
    });
  }
  void write(float* to) {
    each_row([&to, this](const float* row) { to = std::copy_n(row, width_, to); });
  }

 private:
  template <class Body>
  void each_row(Body body) {
    for (std::int64_t n = 0; n < images_; ++n) {
      for (std::int64_t c = 0; c < channels_; ++c) {
        for (std::int64_t y = 0; y < height_; ++y) {
          body(data() + n * pitch().image + c * pitch().plane + y * pitch().row);
        }
      }
    }
  }

  std::int64_t images_, channels_, height_, width_;
  Layout layout_;
  std::vector<float> memory_;
};

conv::Shape shape_of(const std::array<std::int64_t, 3>& input, std::int64_t filters,
                     const std::array<std::int64_t, 2>& kernel, const std::array<std::int64_t, 2>& stride,
                     const std::array<std::int64_t, 2>& dilation, const std::array<std::int64_t, 4>& padding,
                     std::int64_t groups) {
  conv::Shape shape;
  std::tie(shape.channels, shape.height, shape.width) = std::tie(input[0], input[1], input[2]);
  shape.filters = filters;
  shape.groups = groups;
  std::tie(shape.kernel_h, shape.kernel_w) = std::tie(kernel[0], kernel[1]);
  std::tie(shape.stride_h, shape.stride_w) = std::tie(stride[0], stride[1]);
  std::tie(shape.dilation_h, shape.dilation_w) = std::tie(dilation[0], dilation[1]);
  shape.padding = {padding[0], padding[1], padding[2], padding[3]};
  conv::check(shape);
  return shape;
}

// What the cost model chooses for so many kept columns: the method, its cycles, those of them in which the weights
// arrive, and the bytes of the packed weights.
py::tuple conv_estimate(const std::array<std::int64_t, 3>& input, std::int64_t filters, std::int64_t columns,
                        const std::array<std::int64_t, 2>& kernel, const std::array<std::int64_t, 2>& stride,
                        const std::array<std::int64_t, 2>& dilation, const std::array<std::int64_t, 4>& padding,
                        std::int64_t groups, std::int64_t images) {
  const conv::Shape shape = shape_of(input, filters, kernel, stride, dilation, padding, groups);
  const Layout in = conv::layout(images, shape.channels, shape.height, shape.width, shape.padding);
  const conv::Plan plan = conv::plan(shape, in.pitch, images, columns, active_isa());
  const auto* const method = std::find_if(std::begin(kMethods), std::end(kMethods),
                                          [&](const auto& one) { return one.second == plan.method; });
  return py::make_tuple(method->first, plan.cycles, conv::arrival_cycles(plan), conv::packed_size(plan));
}

// input (images, channels, height, width); weight: for every filter one number per column of `columns` that its group
// reads. Packs, runs once and unpacks: for tests, not for speed.
py::array_t<float> conv2d(py::handle input, py::handle weight, const std::vector<std::int64_t>& columns,
                          py::handle bias, std::int64_t filters, const std::array<std::int64_t, 2>& kernel,
                          const std::array<std::int64_t, 2>& stride, const std::array<std::int64_t, 2>& dilation,
                          const std::array<std::int64_t, 4>& padding, std::int64_t groups,
                          const std::string& activation, float slope, py::handle residual, const std::string& method,
                          int threads) {
  const Array x = as_array(input, "input", false);
  ACF_CHECK_TYPE(x.dtype == DType::float32, "input must be float32, got float64");
  ACF_CHECK(x.shape.size() == 4 && x.size() > 0,
            "input must have the shape (images, channels, height, width) without zeros, got ", shape_text(x.shape));
  const std::int64_t images = x.shape[0];
  const conv::Shape shape =
      shape_of({x.shape[1], x.shape[2], x.shape[3]}, filters, kernel, stride, dilation, padding, groups);
  check_columns(columns, shape.columns());
  const auto count = static_cast<std::int64_t>(columns.size());
  const float* weights = floats(weight, "weight", {filters / groups * count});
  const float* biases = bias.is_none() ? nullptr : floats(bias, "bias", {filters});
  const std::int64_t height = shape.out_height(), width = shape.out_width();
  const float* added = residual.is_none() ? nullptr : floats(residual, "residual", {images, filters, height, width});
  conv::Epilogue epilogue;
  epilogue.activation = activation_named(activation);
  epilogue.slope = slope;
  const std::optional<Method> wanted = named(kMethods, method, "method");
  ACF_CHECK(threads >= 1, "threads must be at least 1, got ", threads);

  py::array_t<float> result({images, filters, height, width});
  float* to = result.mutable_data();
  const py::gil_scoped_release release;
  Planes in(images, shape.channels, shape.height, shape.width, shape.padding), out(images, filters, height, width, {}),
      other(added == nullptr ? 0 : images, filters, height, width, {});
  in.read(x.as<float>());
  const Isa isa = active_isa();
  const conv::Plan plan = wanted.has_value() ? conv::plan(shape, in.pitch(), images, count, isa, *wanted)
                                             : conv::plan(shape, in.pitch(), images, count, isa);
  const Memory packed = allocate(conv::packed_size(plan)),
               scratch = allocate(static_cast<std::size_t>(conv::scratch_size(plan)) * sizeof(float));
  conv::pack(plan, columns.data(), weights, biases, packed.get());
  if (added != nullptr) {
    other.read(added);
    epilogue.residual = other.data();
    epilogue.residual_pitch = other.pitch();
  }
  conv::run(plan, packed.get(), images, in.data(), out.data(), out.pitch(), epilogue,
            static_cast<float*>(scratch.get()), threads);
  out.write(to);
  return result;
}

}  // namespace

void register_conv(py::module_& module) {
  module.def("conv2d", &conv2d, py::arg("x"), py::arg("weight"), py::arg("columns"), py::arg("bias"),
             py::arg("filters"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
             py::arg("groups"), py::arg("activation"), py::arg("slope"), py::arg("residual"), py::arg("method"),
             py::arg("threads"));
  module.def("conv_estimate", &conv_estimate, py::arg("shape"), py::arg("filters"), py::arg("columns"),
             py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"), py::arg("groups"),
             py::arg("images"));
}

}  // namespace acf::bindings
