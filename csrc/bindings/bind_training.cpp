#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "core/check.h"
#include "core/isa.h"
#include "training/training.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

using Numbers = py::array_t<std::int32_t, py::array::c_style>;
using Pair = std::array<std::int64_t, 2>;

Array floats(py::handle object, const std::string& name, bool written) {
  Array array = as_array(object, name, written);
  ACF_CHECK_TYPE(array.dtype == DType::float32, name, " must be float32, got float64");
  return array;
}

Array rank_4(py::handle object, const std::string& name) {
  Array array = floats(object, name, false);
  ACF_CHECK(array.shape.size() == 4, name, " must have 4 dimensions, got the shape ", shape_text(array.shape));
  return array;
}

float* expect(const Array& array, const std::string& name, const std::vector<std::int64_t>& shape) {
  ACF_CHECK(array.shape == shape, name, " must have the shape ", shape_text(shape), ", got ", shape_text(array.shape));
  return array.as<float>();
}

std::vector<std::int32_t> numbers(const Numbers& array, const char* name) {
  ACF_CHECK(array.ndim() == 1, name, " must have 1 dimension, got ", array.ndim());
  return {array.data(), array.data() + array.size()};
}

// How a filter is laid over the input; what Python gives in every call.
struct Window {
  Pair stride, padding, dilation;
};

training::Layer layer_of(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& weight,
                         const Numbers& filters, const Numbers& columns, const Window& window) {
  ACF_CHECK(x[2] == weight[1], "x must have the ", weight[1], " channels of the weight, got ", x[2]);
  training::Shape shape;
  shape.height = x[0];
  shape.width = x[1];
  shape.channels = x[2];
  shape.images = x[3];
  shape.filters = weight[0];
  shape.kernel_h = weight[2];
  shape.kernel_w = weight[3];
  shape.stride_h = window.stride[0];
  shape.stride_w = window.stride[1];
  shape.padding_h = window.padding[0];
  shape.padding_w = window.padding[1];
  shape.dilation_h = window.dilation[0];
  shape.dilation_w = window.dilation[1];
  return {shape, numbers(filters, "filters"), numbers(columns, "columns")};
}

std::vector<std::int64_t> out_shape(const training::Shape& shape) {
  return {shape.out_height(), shape.out_width(), shape.filters, shape.images};
}

// The ISA of a call; the threads are checked by parallel_for.
template <class Body>
void run(const Body& body) {
  const Isa isa = active_isa();
  const py::gil_scoped_release release;
  body(isa);
}

void conv_forward(const py::object& x, const py::object& weight, const py::object& bias, const py::object& out,
                  const Numbers& filters, const Numbers& columns, const Pair& stride, const Pair& padding,
                  const Pair& dilation, int threads) {
  const Array from = rank_4(x, "x"), w = rank_4(weight, "weight"), to = floats(out, "out", true);
  const training::Layer layer = layer_of(from.shape, w.shape, filters, columns, {stride, padding, dilation});
  const float* const start =
      bias.is_none() ? nullptr : expect(floats(bias, "bias", false), "bias", {layer.shape.filters});
  float* const result = expect(to, "out", out_shape(layer.shape));
  run([&](Isa isa) { training::forward(layer, from.as<float>(), w.as<float>(), start, result, threads, isa); });
}

void conv_input_gradient(const py::object& out_gradient, const py::object& weight, const py::object& x_gradient,
                         const Numbers& filters, const Numbers& columns, const Pair& stride, const Pair& padding,
                         const Pair& dilation, int threads) {
  const Array g = rank_4(out_gradient, "out_gradient"), w = rank_4(weight, "weight");
  const Array to = floats(x_gradient, "x_gradient", true);
  ACF_CHECK(to.shape.size() == 4, "x_gradient must have 4 dimensions, got the shape ", shape_text(to.shape));
  const training::Layer layer = layer_of(to.shape, w.shape, filters, columns, {stride, padding, dilation});
  const float* const from = expect(g, "out_gradient", out_shape(layer.shape));
  run([&](Isa isa) { training::input_gradient(layer, from, w.as<float>(), to.as<float>(), threads, isa); });
}

void conv_weight_gradient(const py::object& x, const py::object& out_gradient, const py::object& weight_gradient,
                          const py::object& bias_gradient, const Numbers& filters, const Numbers& columns,
                          const Pair& stride, const Pair& padding, const Pair& dilation, int threads) {
  const Array from = rank_4(x, "x"), g = rank_4(out_gradient, "out_gradient");
  const Array to = floats(weight_gradient, "weight_gradient", true);
  ACF_CHECK(to.shape.size() == 4, "weight_gradient must have 4 dimensions, got the shape ", shape_text(to.shape));
  const training::Layer layer = layer_of(from.shape, to.shape, filters, columns, {stride, padding, dilation});
  const training::Shape& s = layer.shape;
  const float* const gradient = expect(g, "out_gradient", out_shape(s));
  float* const sums = bias_gradient.is_none()
                          ? nullptr
                          : expect(floats(bias_gradient, "bias_gradient", true), "bias_gradient", {s.filters});
  run([&](Isa isa) {
    training::weight_gradient(layer, from.as<float>(), gradient, to.as<float>(), threads, isa);
    if (sums != nullptr) {
      training::channel_sums({s.out_height() * s.out_width(), s.filters, s.images}, gradient, sums, threads, isa);
    }
  });
}

training::Pooling pooling_of(const std::vector<std::int64_t>& x, const Pair& kernel, const Pair& stride,
                             const Pair& padding) {
  training::Pooling pooling;
  pooling.height = x[0];
  pooling.width = x[1];
  pooling.channels = x[2];
  pooling.images = x[3];
  pooling.kernel_h = kernel[0];
  pooling.kernel_w = kernel[1];
  pooling.stride_h = stride[0];
  pooling.stride_w = stride[1];
  pooling.padding_h = padding[0];
  pooling.padding_w = padding[1];
  training::check(pooling);
  return pooling;
}

std::vector<std::int64_t> out_shape(const training::Pooling& pooling) {
  return {pooling.out_height(), pooling.out_width(), pooling.channels, pooling.images};
}

py::array_t<std::uint8_t> max_pool_forward(const py::object& x, const py::object& out, const Pair& kernel,
                                           const Pair& stride, const Pair& padding, int threads) {
  const Array from = rank_4(x, "x"), to = floats(out, "out", true);
  const training::Pooling pooling = pooling_of(from.shape, kernel, stride, padding);
  float* const result = expect(to, "out", out_shape(pooling));
  py::array_t<std::uint8_t> at(out_shape(pooling));
  std::uint8_t* const numbers_at = at.mutable_data();
  run([&](Isa isa) { training::maxima(pooling, from.as<float>(), result, numbers_at, threads, isa); });
  return at;
}

void max_pool_gradient(const py::object& out_gradient, const py::array_t<std::uint8_t, py::array::c_style>& at,
                       const py::object& x_gradient, const Pair& kernel, const Pair& stride, const Pair& padding,
                       int threads) {
  const Array g = rank_4(out_gradient, "out_gradient"), to = floats(x_gradient, "x_gradient", true);
  ACF_CHECK(to.shape.size() == 4, "x_gradient must have 4 dimensions, got the shape ", shape_text(to.shape));
  const training::Pooling pooling = pooling_of(to.shape, kernel, stride, padding);
  const float* const from = expect(g, "out_gradient", out_shape(pooling));
  const std::vector<std::int64_t> shape(at.shape(), at.shape() + at.ndim());
  ACF_CHECK(shape == out_shape(pooling), "at must have the shape ", shape_text(out_shape(pooling)), ", got ",
            shape_text(shape));
  const std::uint8_t* const numbers_at = at.data();
  run([&](Isa isa) { training::maxima_gradient(pooling, from, numbers_at, to.as<float>(), threads, isa); });
}

// x as (height, width, channels, images), weight and bias as (channels) or None.
training::Normalisation normalisation_of(const Array& x, const py::object& weight, const py::object& bias) {
  training::Normalisation n;
  n.of = {x.shape[0] * x.shape[1], x.shape[2], x.shape[3]};
  ACF_CHECK(n.of.values() > 0, "x must have values, got the shape ", shape_text(x.shape));
  if (!weight.is_none()) n.weight = expect(floats(weight, "weight", false), "weight", {n.of.channels});
  if (!bias.is_none()) n.bias = expect(floats(bias, "bias", false), "bias", {n.of.channels});
  return n;
}

void batch_norm_forward(const py::object& x, const py::object& weight, const py::object& bias, double eps,
                        const py::object& out, const py::object& mean, const py::object& variance, int threads) {
  const Array from = rank_4(x, "x");
  const training::Normalisation n = normalisation_of(from, weight, bias);
  float* const to = expect(floats(out, "out", true), "out", from.shape);
  float* const middle = expect(floats(mean, "mean", true), "mean", {n.of.channels});
  float* const spread = expect(floats(variance, "variance", true), "variance", {n.of.channels});
  run([&](Isa isa) { training::normalise(n, from.as<float>(), eps, to, middle, spread, threads, isa); });
}

void batch_norm_gradient(const py::object& x, const py::object& out_gradient, const py::object& weight,
                         const py::object& mean, const py::object& variance, double eps, const py::object& x_gradient,
                         const py::object& weight_gradient, const py::object& bias_gradient, int threads) {
  const Array from = rank_4(x, "x");
  const training::Normalisation n = normalisation_of(from, weight, py::none());
  const float* const g = expect(floats(out_gradient, "out_gradient", false), "out_gradient", from.shape);
  const float* const middle = expect(floats(mean, "mean", false), "mean", {n.of.channels});
  const float* const spread = expect(floats(variance, "variance", false), "variance", {n.of.channels});
  float* const to = expect(floats(x_gradient, "x_gradient", true), "x_gradient", from.shape);
  float* const of_weight = expect(floats(weight_gradient, "weight_gradient", true), "weight_gradient", {n.of.channels});
  float* const of_bias = expect(floats(bias_gradient, "bias_gradient", true), "bias_gradient", {n.of.channels});
  run([&](Isa isa) {
    training::normalise_gradient(n, from.as<float>(), g, middle, spread, eps, to, of_weight, of_bias, threads, isa);
  });
}

}  // namespace

void register_training(py::module_& module) {
  module.def("conv_forward", &conv_forward, py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("out"),
             py::arg("filters").noconvert(), py::arg("columns").noconvert(), py::arg("stride"), py::arg("padding"),
             py::arg("dilation"), py::arg("threads"));
  module.def("conv_input_gradient", &conv_input_gradient, py::arg("out_gradient"), py::arg("weight"),
             py::arg("x_gradient"), py::arg("filters").noconvert(), py::arg("columns").noconvert(), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("threads"));
  module.def("conv_weight_gradient", &conv_weight_gradient, py::arg("x"), py::arg("out_gradient"),
             py::arg("weight_gradient"), py::arg("bias_gradient").none(true), py::arg("filters").noconvert(),
             py::arg("columns").noconvert(), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             py::arg("threads"));
  module.def("max_pool_forward", &max_pool_forward, py::arg("x"), py::arg("out"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("threads"));
  module.def("max_pool_gradient", &max_pool_gradient, py::arg("out_gradient"), py::arg("at").noconvert(),
             py::arg("x_gradient"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("threads"));
  module.def("batch_norm_forward", &batch_norm_forward, py::arg("x"), py::arg("weight").none(true),
             py::arg("bias").none(true), py::arg("eps"), py::arg("out"), py::arg("mean"), py::arg("variance"),
             py::arg("threads"));
  module.def("batch_norm_gradient", &batch_norm_gradient, py::arg("x"), py::arg("out_gradient"),
             py::arg("weight").none(true), py::arg("mean"), py::arg("variance"), py::arg("eps"), py::arg("x_gradient"),
             py::arg("weight_gradient"), py::arg("bias_gradient"), py::arg("threads"));
}

}  // namespace acf::bindings
