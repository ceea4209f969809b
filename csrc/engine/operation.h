// What the steps of a network do. An operation is made once; it is prepared for a number of samples and the places
// where its operands lie, and then run any number of times, by several threads at once if each has memory of its own.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "conv/conv.h"
#include "conv/kernels.h"
#include "core/isa.h"
#include "core/memory.h"
#include "engine/layout.h"
#include "narrow/narrow.h"

namespace acf::engine {

// How the products of a layer are computed, where there are several ways: conv::Method, or in numbers of fewer bits.
enum class Way {
  pixels_in_lanes,
  filters_in_lanes,
  winograd_tiles_in_lanes,
  winograd_filters_in_lanes,
  narrow,
};

class Task {
 public:
  virtual ~Task() = default;
  // operands: the first elements of the inputs and, last, of the output. scratch: of the size below.
  virtual void run(float* const* operands, float* scratch, int threads) const = 0;

  virtual std::optional<Way> way() const { return {}; }  // of layers

  std::int64_t scratch = 0;  // floats
};

// What a network is prepared for.
struct Machine {
  Isa isa;
  Pool& weights;  // memory for them, which lives as long as the network
};

class Operation {
 public:
  virtual ~Operation() = default;
  virtual bool on_planes() const { return false; }  // whether its first input and its output are planes with halos
  virtual conv::Padding halo() const { return {}; }
  virtual bool keeps_order() const {
    return false;
  }  // only the shape changes: where both lie in order, nothing is done
  // Values of 8 bits. Of which numbers an operand may be bytes, if at all; and whether what it makes may be. input: the
  // shape of the first one.
  virtual const narrow::Quantization* reads_bytes(const Machine& /*machine*/, const Shape& /*input*/,
                                                  std::size_t /*operand*/) const {
    return nullptr;
  }
  virtual bool makes_bytes(const Machine& /*machine*/, const Shape& /*input*/, std::size_t /*operands*/) const {
    return false;
  }
  // Whether it is quicker on bytes than on planes, slower, or neither.
  enum class Gain { none, quicker, slower };
  virtual Gain gain_of_bytes(const Machine& /*machine*/, const Shape& /*input*/) const { return Gain::none; }
  virtual bool passes_bytes() const { return false; }  // makes bytes of bytes of any numbers, which stay the same
  virtual Shape infer(const std::vector<Shape>& inputs) const = 0;  // throws std::invalid_argument
  virtual std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                        const Layout& output) = 0;

  // Layers: to be computed in this way when it is prepared for so many samples, where that can be, and not as
  // estimated. 0 stands for every number that has no preference of its own.
  void prefer(std::int64_t samples, std::optional<Way> way) { preferred_[samples] = way; }

 protected:
  std::optional<Way> preferred(std::int64_t samples) const {
    auto found = preferred_.find(samples);
    if (found == preferred_.end()) found = preferred_.find(0);
    return found == preferred_.end() ? std::nullopt : found->second;
  }

 private:
  std::map<std::int64_t, std::optional<Way>> preferred_;
};

struct Activated {
  conv::Activation activation = conv::Activation::none;
  float slope = 0.01f;
};

// weights: (filters, columns kept of the filter's group).
struct Weights {
  std::int64_t filters = 0;
  std::vector<std::int64_t> columns;
  std::vector<float> values, bias;  // no bias: empty
};

// Which numbers a layer multiplies. bfloat16: where that is quicker than float32. int8: the weights are integers, each
// filter has a scale, and `input` says how values become integers; `residual`, if there, to what residuals are rounded.
enum class Precision { float32, bfloat16, int8 };
struct Arithmetic {
  Precision precision = Precision::float32;
  narrow::Quantization input;
  std::vector<float> scales;
  std::optional<narrow::Quantization> residual;
};

// Of which every filter keeps other weights: compressed rows. offsets: (filters + 1,).
struct SparseWeights {
  std::int64_t filters = 0;
  std::vector<std::int64_t> offsets, indices;  // indices: columns of the filter's group
  std::vector<float> values, bias;
};

struct Window {
  std::int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  conv::Padding padding;
};

struct Pooling {
  Window window;
  bool largest = true, ceil = false, count_padding = true;
};

// A residual is a second input that is added before the activation.
std::unique_ptr<Operation> convolution(const Window& window, std::int64_t groups, Weights weights,
                                       const Activated& activated, Arithmetic arithmetic = {});
std::unique_ptr<Operation> sparse_convolution(const Window& window, std::int64_t groups, SparseWeights weights,
                                              const Activated& activated);
// A 1x1 convolution, and a depthwise one of its result, which is made and used some channels at a time: it would leave
// the cache otherwise.
std::unique_ptr<Operation> expansion(Weights expand, const Activated& expanded, const Window& window, Weights depthwise,
                                     const Activated& activated);
std::unique_ptr<Operation> linear(Weights weights, std::int64_t features, const Activated& activated,
                                  Arithmetic arithmetic = {});
std::unique_ptr<Operation> sparse_linear(SparseWeights weights, std::int64_t features, const Activated& activated);
std::unique_ptr<Operation> pool(const Pooling& pooling);
std::unique_ptr<Operation> adaptive_average(std::int64_t height, std::int64_t width);
std::unique_ptr<Operation> mean(std::vector<std::int64_t> axes, bool keep);
std::unique_ptr<Operation> norm(std::vector<std::int64_t> axes, bool keep);  // the root of the sum of squares
// With one input the second operand is the constant, whose dimensions are the last ones of the input.
std::unique_ptr<Operation> combine(conv::Combine combine, Shape constant_shape, std::vector<float> constant,
                                   const Activated& activated);
std::unique_ptr<Operation> activate(const Activated& activated);
std::unique_ptr<Operation> clip(float low, float high);
std::unique_ptr<Operation> softmax(std::int64_t axis, bool logarithm);
// Over the last `dims` dimensions, in the order of which scale and shift are given; either may be empty.
std::unique_ptr<Operation> layer_norm(std::int64_t dims, float epsilon, std::vector<float> scale,
                                      std::vector<float> shift);
// Matrices are the last two dimensions of a value. Two inputs: (rows, depth) times (depth, columns).
std::unique_ptr<Operation> matmul();
// Three inputs: queries (rows, features), keys (keys, features) and values (keys, columns). For every query the mean of
// the values, weighted by the softmax of its products with the keys, times scale.
std::unique_ptr<Operation> attention(float scale);
std::unique_ptr<Operation> concat(std::int64_t axis);
std::unique_ptr<Operation> reshape(Shape shape);
std::unique_ptr<Operation> transpose(std::vector<std::int64_t> order);
std::unique_ptr<Operation> pad(Shape before, Shape after, float value);
std::unique_ptr<Operation> slice(std::int64_t axis, std::int64_t start, std::int64_t stop, std::int64_t step);
std::unique_ptr<Operation> take(std::int64_t axis, std::vector<std::int64_t> indices);

}  // namespace acf::engine
