// Convolutions, poolings and normalisations while they train: forward, and the gradients of inputs and weights. What a
// convolution computes is that of the filters and columns that are kept, so that a step costs what is left of the
// network.
//
// Tensors are float32, dense, (height, width, channels, images): all images of a channel of a pixel lie side by side,
// all channels of a pixel follow each other. Registers hold images, so that every stride, dilation, padding, plane and
// number of filters is as fast as any other; what a pixel needs of its neighbours is some long runs; and nothing is
// copied into windows or borders.
//
// Weights are (filters, channels * kernel_h * kernel_w), as torch has them. What is not kept counts as zero, is not
// read, and gets a gradient of zero.
#pragma once

#include <cstdint>
#include <vector>

#include "core/isa.h"

namespace acf::training {

struct Shape {
  std::int64_t images = 0, channels = 0, height = 0, width = 0, filters = 0;
  std::int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0, dilation_h = 1,
               dilation_w = 1;

  std::int64_t taps() const { return kernel_h * kernel_w; }
  std::int64_t columns() const { return channels * taps(); }
  std::int64_t out_height() const { return (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  std::int64_t out_width() const { return (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
};

// Throws std::invalid_argument for sizes below 1, negative padding, a kernel larger than the padded input, and tensors
// of 2^31 values or more.
void check(const Shape& shape);

// A layer with what is kept of it: numbers below `filters` and `columns()`, each rising. Throws std::invalid_argument
// for others.
struct Layer {
  Layer(const Shape& of, std::vector<std::int32_t> kept_filters, std::vector<std::int32_t> kept_columns);

  Shape shape;
  std::vector<std::int32_t> filters, columns;
};

// out[f] = bias[f] + sum over kept columns of w[f, column] * x[...]; bias alone for a filter that is not kept. `bias`
// may be null: zeros.
void forward(const Layer& layer, const float* x, const float* weight, const float* bias, float* out, int threads,
             Isa isa);

// The gradient of x, from that of out.
void input_gradient(const Layer& layer, const float* out_gradient, const float* weight, float* x_gradient, int threads,
                    Isa isa);

// The gradient of the weight, all filters and columns, zero where not kept. The order of summation depends on the shape
// and on the ISA, not on the threads.
void weight_gradient(const Layer& layer, const float* x, const float* out_gradient, float* weight_gradient, int threads,
                     Isa isa);

// Pixels of any tensor, each with so many channels of so many images.
struct Pixels {
  std::int64_t pixels = 0, channels = 0, images = 0;

  std::int64_t values() const { return pixels * channels * images; }
};

// sums[c] = the sum of all values of channel c.
void channel_sums(const Pixels& of, const float* x, float* sums, int threads, Isa isa);

// Maximum pooling. `at` has the number of the tap that is the largest of every window, the first of equals; a NaN is
// larger than all.
struct Pooling {
  std::int64_t images = 0, channels = 0, height = 0, width = 0;
  std::int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;

  std::int64_t out_height() const { return (height + 2 * padding_h - kernel_h) / stride_h + 1; }
  std::int64_t out_width() const { return (width + 2 * padding_w - kernel_w) / stride_w + 1; }
};

// Throws std::invalid_argument for sizes below 1, windows of more than 256 taps, or larger than the padded input, and
// padding of more than half a window, which could leave one with nothing in it.
void check(const Pooling& pooling);
void maxima(const Pooling& pooling, const float* x, float* out, std::uint8_t* at, int threads, Isa isa);
void maxima_gradient(const Pooling& pooling, const float* out_gradient, const std::uint8_t* at, float* x_gradient,
                     int threads, Isa isa);

// Batch normalisation of every channel:
//   out = (x - mean) * scale * weight + bias   with scale = 1 / sqrt(variance + eps), variance over all values
//   (biased).
// weight and bias, of a value for every channel, may be null: 1 and 0. Results do not depend on the threads.
struct Normalisation {
  Pixels of;
  const float *weight = nullptr, *bias = nullptr;
};
void normalise(const Normalisation& n, const float* x, double eps, float* out, float* mean, float* variance,
               int threads, Isa isa);

// Its gradients:
//   bias_gradient = sum of g,   weight_gradient = sum of g * (x - mean) * scale
//   x_gradient = weight * scale * (g - bias_gradient / count - (x - mean) * scale * weight_gradient / count)
// with the mean and variance that `normalise` found, and the count of values of a channel.
void normalise_gradient(const Normalisation& n, const float* x, const float* out_gradient, const float* mean,
                        const float* variance, double eps, float* x_gradient, float* weight_gradient,
                        float* bias_gradient, int threads, Isa isa);

namespace reference {
void normalise(const Normalisation& n, const float* x, double eps, float* out, float* mean, float* variance);
void normalise_gradient(const Normalisation& n, const float* x, const float* out_gradient, const float* mean,
                        const float* variance, double eps, float* x_gradient, float* weight_gradient,
                        float* bias_gradient);
void maxima(const Pooling& pooling, const float* x, float* out, std::uint8_t* at);
void maxima_gradient(const Pooling& pooling, const float* out_gradient, const std::uint8_t* at, float* x_gradient);
void forward(const Layer& layer, const float* x, const float* weight, const float* bias, float* out);
void input_gradient(const Layer& layer, const float* out_gradient, const float* weight, float* x_gradient);
void weight_gradient(const Layer& layer, const float* x, const float* out_gradient, float* weight_gradient);
}  // namespace reference

}  // namespace acf::training
