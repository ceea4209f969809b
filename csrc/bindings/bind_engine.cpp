#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/activations.h"
#include "core/check.h"
#include "engine/network.h"

namespace py = pybind11;

namespace acf::bindings {
namespace {

using engine::Activated;
using engine::Network;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Indices = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Integers = std::vector<std::int64_t>;
using Pair = std::array<std::int64_t, 2>;

std::vector<float> floats(const Floats& array) { return {array.data(), array.data() + array.size()}; }
Integers integers(const Indices& array) { return {array.data(), array.data() + array.size()}; }

Activated activated(const std::string& name, float slope) { return {activation_named(name), slope}; }

engine::Weights weights(std::int64_t filters, const Indices& columns, const Floats& values, const Floats& bias) {
  return {filters, integers(columns), floats(values), floats(bias)};
}

engine::SparseWeights sparse_weights(const Indices& offsets, const Indices& indices, const Floats& values,
                                     const Floats& bias) {
  const auto filters = static_cast<std::int64_t>(offsets.size()) - 1;
  return {filters, integers(offsets), integers(indices), floats(values), floats(bias)};
}

// How integers stand for values: their scale and zero point.
using Quantization = std::pair<float, std::int32_t>;

// scale, zero, scales and residual: of int8.
engine::Arithmetic arithmetic(const std::string& precision, float scale, std::int32_t zero, const Floats& scales,
                              const std::optional<Quantization>& residual = {}) {
  constexpr std::pair<const char*, engine::Precision> kNames[] = {{"float32", engine::Precision::float32},
                                                                  {"bfloat16", engine::Precision::bfloat16},
                                                                  {"int8", engine::Precision::int8}};
  for (const auto& [known, value] : kNames) {
    if (precision != known) continue;
    engine::Arithmetic made = {value, {scale, zero}, floats(scales), {}};
    if (residual) made.residual = {residual->first, residual->second};
    return made;
  }
  ACF_CHECK(false, "precision must be float32, bfloat16 or int8, got '", precision, "'");
  return {};
}

// padding: top, bottom, left, right.
engine::Window window(const Pair& kernel, const Pair& stride, const Pair& dilation,
                      const std::array<std::int64_t, 4>& padding) {
  return {kernel[0],
          kernel[1],
          stride[0],
          stride[1],
          dilation[0],
          dilation[1],
          {padding[0], padding[2], padding[1], padding[3]}};
}

engine::Pooling pooling(bool largest, const Pair& kernel, const Pair& stride, const Pair& dilation, const Pair& padding,
                        bool ceil, bool count_padding) {
  return {window(kernel, stride, dilation, {padding[0], padding[0], padding[1], padding[1]}), largest, ceil,
          count_padding};
}

conv::Combine combine_named(const std::string& name) {
  constexpr std::pair<const char*, conv::Combine> kNames[] = {{"add", conv::Combine::add},
                                                              {"sub", conv::Combine::subtract},
                                                              {"mul", conv::Combine::multiply},
                                                              {"div", conv::Combine::divide}};
  for (const auto& [known, combine] : kNames) {
    if (name == known) return combine;
  }
  ACF_CHECK(false, "unknown operator '", name, "'");
  return {};
}

using engine::Way;

constexpr std::pair<const char*, Way> kWays[] = {
    {"pixels_in_lanes", Way::pixels_in_lanes},
    {"filters_in_lanes", Way::filters_in_lanes},
    {"winograd_tiles_in_lanes", Way::winograd_tiles_in_lanes},
    {"winograd_filters_in_lanes", Way::winograd_filters_in_lanes},
    {"narrow", Way::narrow},
};

std::optional<Way> way_named(const std::optional<std::string>& name) {
  if (!name) return {};
  for (const auto& [known, way] : kWays) {
    if (*name == known) return way;
  }
  ACF_CHECK(false, "unknown way '", *name, "'");
  return {};
}

std::vector<std::optional<std::string>> ways(Network& network, std::int64_t images) {
  std::vector<std::optional<std::string>> names;
  for (const std::optional<Way> way : network.ways(images)) {
    names.emplace_back();
    for (const auto& [name, known] : kWays) {
      if (way == known) names.back() = name;
    }
  }
  return names;
}

// The arrays of one run, checked and made.
struct Arrays {
  Arrays(const Network& network, const std::vector<Floats>& inputs) {
    ACF_CHECK(static_cast<int>(inputs.size()) == network.inputs(), "the network takes ", network.inputs(),
              " inputs, got ", inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const Floats& input = inputs[i];
      const engine::Shape& shape = network.shape(static_cast<int>(i));
      ACF_CHECK(static_cast<std::size_t>(input.ndim()) == shape.size() + 1 &&
                    std::equal(shape.begin(), shape.end(), input.shape() + 1) && (i == 0 || images == input.shape(0)),
                "input ", i, " has another shape than the network's");
      images = input.shape(0);
      from.push_back(input.data());
    }
    for (const int value : network.outputs()) {
      std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(images)};
      for (const std::int64_t size : network.shape(value)) shape.push_back(static_cast<py::ssize_t>(size));
      py::array_t<float> output(shape);
      to.push_back(output.mutable_data());
      outputs.append(std::move(output));
    }
  }

  std::int64_t images = 0;
  std::vector<const float*> from;
  std::vector<float*> to;
  py::list outputs;
};

void check_threads(int threads) { ACF_CHECK(threads >= 1, "threads must be at least 1, got ", threads); }

py::list run(Network& network, const std::vector<Floats>& inputs, int threads, std::int64_t part) {
  check_threads(threads);
  const Arrays arrays(network, inputs);
  {
    const py::gil_scoped_release release;
    network.run(arrays.images, part, arrays.from.data(), arrays.to.data(), threads);
  }
  return arrays.outputs;
}

// (rounds, steps), seconds.
py::array_t<double> profile(Network& network, const std::vector<Floats>& inputs, int threads, std::int64_t part,
                            std::int64_t rounds) {
  check_threads(threads);
  ACF_CHECK(rounds >= 1, "rounds must be at least 1, got ", rounds);
  const Arrays arrays(network, inputs);
  const auto steps = static_cast<std::int64_t>(network.steps());
  py::array_t<double> seconds({rounds, steps});
  double* row = seconds.mutable_data();
  const py::gil_scoped_release release;
  for (std::int64_t round = 0; round < rounds; ++round, row += steps) {
    network.run(arrays.images, part, arrays.from.data(), arrays.to.data(), threads, row);
  }
  return seconds;
}

}  // namespace

// Steps are added by methods named after the operations of docs/acf-format.md; each returns the number of the value.
void register_engine(py::module_& module) {
  module.def(
      "narrow_units",
      [](const std::string& number) {
        ACF_CHECK(number == "bfloat16" || number == "int8", "number must be bfloat16 or int8, got '", number, "'");
        std::vector<std::string_view> names;
        const auto narrow = number == "int8" ? narrow::Number::int8 : narrow::Number::bfloat16;
        for (const narrow::Unit unit : narrow::units(active_isa(), narrow)) names.push_back(narrow::unit_name(unit));
        return names;
      },
      py::arg("number"));
  module.def(
      "peak_flops", [] { return conv::peak_flops(active_isa()); }, py::call_guard<py::gil_scoped_release>());
  using Inputs = std::vector<int>;
  using Four = std::array<std::int64_t, 4>;
  py::class_<Network>(module, "Network")
      .def(py::init([] { return std::make_unique<Network>(active_isa()); }))
      .def("input", &Network::add_input, py::arg("shape"))
      .def(
          "conv",
          [](Network& network, const Inputs& inputs, const Pair& kernel, const Pair& stride, const Pair& dilation,
             const Four& padding, std::int64_t groups, std::int64_t filters, const Indices& columns,
             const Floats& values, const Floats& bias, const std::string& activation, const std::string& precision,
             float scale, std::int32_t zero, const Floats& scales, const std::optional<Quantization>& residual) {
            return network.add(engine::convolution(window(kernel, stride, dilation, padding), groups,
                                                   weights(filters, columns, values, bias), activated(activation, 0),
                                                   arithmetic(precision, scale, zero, scales, residual)),
                               inputs);
          },
          py::arg("inputs"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
          py::arg("groups"), py::arg("filters"), py::arg("columns"), py::arg("values"), py::arg("bias"),
          py::arg("activation"), py::arg("precision"), py::arg("scale"), py::arg("zero"), py::arg("scales"),
          py::arg("residual"))
      .def(
          "expansion",
          [](Network& network, const Inputs& inputs, std::int64_t filters, const Indices& columns,
             const Floats& expand_values, const Floats& expand_bias, const std::string& expand_activation,
             const Pair& kernel, const Pair& stride, const Pair& dilation, const Four& padding, const Floats& values,
             const Floats& bias, const std::string& activation) {
            Integers all(static_cast<std::size_t>(values.size()));
            std::iota(all.begin(), all.end(), 0);
            return network.add(
                engine::expansion(weights(filters, columns, expand_values, expand_bias),
                                  activated(expand_activation, 0), window(kernel, stride, dilation, padding),
                                  {filters, std::move(all), floats(values), floats(bias)}, activated(activation, 0)),
                inputs);
          },
          py::arg("inputs"), py::arg("filters"), py::arg("columns"), py::arg("expand_values"), py::arg("expand_bias"),
          py::arg("expand_activation"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
          py::arg("values"), py::arg("bias"), py::arg("activation"))
      .def(
          "sparse_conv",
          [](Network& network, const Inputs& inputs, const Pair& kernel, const Pair& stride, const Pair& dilation,
             const Four& padding, std::int64_t groups, const Indices& offsets, const Indices& indices,
             const Floats& values, const Floats& bias, const std::string& activation) {
            return network.add(
                engine::sparse_convolution(window(kernel, stride, dilation, padding), groups,
                                           sparse_weights(offsets, indices, values, bias), activated(activation, 0)),
                inputs);
          },
          py::arg("inputs"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
          py::arg("groups"), py::arg("offsets"), py::arg("indices"), py::arg("values"), py::arg("bias"),
          py::arg("activation"))
      .def(
          "linear",
          [](Network& network, const Inputs& inputs, std::int64_t features, std::int64_t filters,
             const Indices& columns, const Floats& values, const Floats& bias, const std::string& activation,
             const std::string& precision, float scale, std::int32_t zero, const Floats& scales) {
            return network.add(engine::linear(weights(filters, columns, values, bias), features,
                                              activated(activation, 0), arithmetic(precision, scale, zero, scales)),
                               inputs);
          },
          py::arg("inputs"), py::arg("features"), py::arg("filters"), py::arg("columns"), py::arg("values"),
          py::arg("bias"), py::arg("activation"), py::arg("precision"), py::arg("scale"), py::arg("zero"),
          py::arg("scales"))
      .def(
          "sparse_linear",
          [](Network& network, const Inputs& inputs, std::int64_t features, const Indices& offsets,
             const Indices& indices, const Floats& values, const Floats& bias, const std::string& activation) {
            return network.add(engine::sparse_linear(sparse_weights(offsets, indices, values, bias), features,
                                                     activated(activation, 0)),
                               inputs);
          },
          py::arg("inputs"), py::arg("features"), py::arg("offsets"), py::arg("indices"), py::arg("values"),
          py::arg("bias"), py::arg("activation"))
      .def(
          "max_pool",
          [](Network& network, const Inputs& inputs, const Pair& kernel, const Pair& stride, const Pair& dilation,
             const Pair& padding, bool ceil) {
            return network.add(engine::pool(pooling(true, kernel, stride, dilation, padding, ceil, false)), inputs);
          },
          py::arg("inputs"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
          py::arg("ceil"))
      .def(
          "avg_pool",
          [](Network& network, const Inputs& inputs, const Pair& kernel, const Pair& stride, const Pair& padding,
             bool ceil, bool count_padding) {
            return network.add(engine::pool(pooling(false, kernel, stride, {1, 1}, padding, ceil, count_padding)),
                               inputs);
          },
          py::arg("inputs"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("ceil"),
          py::arg("count_padding"))
      .def(
          "adaptive_avg_pool",
          [](Network& network, const Inputs& inputs, const Pair& output) {
            return network.add(engine::adaptive_average(output[0], output[1]), inputs);
          },
          py::arg("inputs"), py::arg("output"))
      .def(
          "mean",
          [](Network& network, const Inputs& inputs, Integers axes, bool keep) {
            return network.add(engine::mean(std::move(axes), keep), inputs);
          },
          py::arg("inputs"), py::arg("axes"), py::arg("keep"))
      .def(
          "norm",
          [](Network& network, const Inputs& inputs, Integers axes, bool keep) {
            return network.add(engine::norm(std::move(axes), keep), inputs);
          },
          py::arg("inputs"), py::arg("axes"), py::arg("keep"))
      .def(
          "combine",
          [](Network& network, const Inputs& inputs, const std::string& op, const std::string& activation) {
            return network.add(engine::combine(combine_named(op), {}, {}, activated(activation, 0)), inputs);
          },
          py::arg("inputs"), py::arg("op"), py::arg("activation"))
      .def(
          "combine_constant",
          [](Network& network, const Inputs& inputs, const std::string& op, const Floats& constant,
             const std::string& activation) {
            engine::Shape shape(constant.shape(), constant.shape() + constant.ndim());
            return network.add(
                engine::combine(combine_named(op), std::move(shape), floats(constant), activated(activation, 0)),
                inputs);
          },
          py::arg("inputs"), py::arg("op"), py::arg("constant"), py::arg("activation"))
      .def(
          "activation",
          [](Network& network, const Inputs& inputs, const std::string& activation, float slope) {
            return network.add(engine::activate(activated(activation, slope)), inputs);
          },
          py::arg("inputs"), py::arg("activation"), py::arg("slope"))
      .def(
          "clip",
          [](Network& network, const Inputs& inputs, float low, float high) {
            return network.add(engine::clip(low, high), inputs);
          },
          py::arg("inputs"), py::arg("low"), py::arg("high"))
      .def(
          "softmax",
          [](Network& network, const Inputs& inputs, std::int64_t axis, bool logarithm) {
            return network.add(engine::softmax(axis, logarithm), inputs);
          },
          py::arg("inputs"), py::arg("axis"), py::arg("logarithm"))
      .def(
          "matmul", [](Network& network, const Inputs& inputs) { return network.add(engine::matmul(), inputs); },
          py::arg("inputs"))
      .def(
          "attention",
          [](Network& network, const Inputs& inputs, float scale) {
            return network.add(engine::attention(scale), inputs);
          },
          py::arg("inputs"), py::arg("scale"))
      .def(
          "layer_norm",
          [](Network& network, const Inputs& inputs, std::int64_t dims, float epsilon, const Floats& scale,
             const Floats& shift) {
            return network.add(engine::layer_norm(dims, epsilon, floats(scale), floats(shift)), inputs);
          },
          py::arg("inputs"), py::arg("dims"), py::arg("epsilon"), py::arg("scale"), py::arg("shift"))
      .def(
          "concat",
          [](Network& network, const Inputs& inputs, std::int64_t axis) {
            return network.add(engine::concat(axis), inputs);
          },
          py::arg("inputs"), py::arg("axis"))
      .def(
          "reshape",
          [](Network& network, const Inputs& inputs, Integers shape) {
            return network.add(engine::reshape(std::move(shape)), inputs);
          },
          py::arg("inputs"), py::arg("shape"))
      .def(
          "transpose",
          [](Network& network, const Inputs& inputs, Integers order) {
            return network.add(engine::transpose(std::move(order)), inputs);
          },
          py::arg("inputs"), py::arg("order"))
      .def(
          "pad",
          [](Network& network, const Inputs& inputs, Integers before, Integers after, float value) {
            return network.add(engine::pad(std::move(before), std::move(after), value), inputs);
          },
          py::arg("inputs"), py::arg("before"), py::arg("after"), py::arg("value"))
      .def(
          "slice",
          [](Network& network, const Inputs& inputs, std::int64_t axis, std::int64_t start, std::int64_t stop,
             std::int64_t step) { return network.add(engine::slice(axis, start, stop, step), inputs); },
          py::arg("inputs"), py::arg("axis"), py::arg("start"), py::arg("stop"), py::arg("step"))
      .def(
          "take",
          [](Network& network, const Inputs& inputs, std::int64_t axis, const Indices& indices) {
            return network.add(engine::take(axis, integers(indices)), inputs);
          },
          py::arg("inputs"), py::arg("axis"), py::arg("indices"))
      .def("finish", &Network::finish, py::arg("outputs"))
      .def(
          "stage",
          [](const Network& network, std::size_t begin, std::size_t end) {
            Network::Stage stage = network.stage(begin, end);
            return py::make_tuple(std::move(stage.network), stage.inputs, stage.outputs);
          },
          py::arg("begin"), py::arg("end"))
      .def("run", &run, py::arg("inputs"), py::arg("threads"), py::arg("part"))
      .def("profile", &profile, py::arg("inputs"), py::arg("threads"), py::arg("part"), py::arg("rounds"))
      .def(
          "prefer",
          [](Network& network, std::size_t step, std::int64_t samples, const std::optional<std::string>& way) {
            network.prefer(step, samples, way_named(way));
          },
          py::arg("step"), py::arg("samples"), py::arg("way"), py::call_guard<py::gil_scoped_release>())
      .def("ways", &ways, py::arg("samples"))
      .def("is_bytes", &Network::is_bytes, py::arg("value"), py::call_guard<py::gil_scoped_release>())
      .def("workspace_bytes", &Network::workspace_bytes, py::arg("samples"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace acf::bindings
