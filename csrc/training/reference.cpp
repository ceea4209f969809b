// The convolutions as their formulas, in double: the oracle of the tests.
#include <algorithm>
#include <cmath>
#include <vector>

#include "training/training.h"

namespace acf::training::reference {
namespace {

// body(index in out, index in weight, index in x) for every product of the convolution that is kept.
template <class Body>
void each_product(const Layer& layer, const Body& body) {
  const Shape& s = layer.shape;
  for (const std::int64_t filter : layer.filters) {
    for (const std::int64_t column : layer.columns) {
      const std::int64_t channel = column / s.taps(), tap = column % s.taps();
      for (std::int64_t y = 0; y < s.out_height(); ++y) {
        for (std::int64_t x = 0; x < s.out_width(); ++x) {
          const std::int64_t in_y = y * s.stride_h - s.padding_h + tap / s.kernel_w * s.dilation_h;
          const std::int64_t in_x = x * s.stride_w - s.padding_w + tap % s.kernel_w * s.dilation_w;
          if (in_y < 0 || in_y >= s.height || in_x < 0 || in_x >= s.width) continue;
          for (std::int64_t image = 0; image < s.images; ++image) {
            body(((y * s.out_width() + x) * s.filters + filter) * s.images + image, filter * s.columns() + column,
                 ((in_y * s.width + in_x) * s.channels + channel) * s.images + image);
          }
        }
      }
    }
  }
}

void store(const std::vector<double>& sums, float* to) {
  std::transform(sums.begin(), sums.end(), to, [](double sum) { return static_cast<float>(sum); });
}

std::vector<double> zeros(std::int64_t count) { return std::vector<double>(static_cast<std::size_t>(count)); }

}  // namespace

void forward(const Layer& layer, const float* x, const float* weight, const float* bias, float* out) {
  const Shape& s = layer.shape;
  std::vector<double> sums = zeros(s.out_height() * s.out_width() * s.filters * s.images);
  for (std::size_t i = 0; i < sums.size() && bias != nullptr; ++i) {
    sums[i] = static_cast<double>(bias[static_cast<std::int64_t>(i) / s.images % s.filters]);
  }
  each_product(layer, [&](std::int64_t to, std::int64_t w, std::int64_t from) {
    sums[static_cast<std::size_t>(to)] += static_cast<double>(weight[w]) * static_cast<double>(x[from]);
  });
  store(sums, out);
}

void input_gradient(const Layer& layer, const float* out_gradient, const float* weight, float* x_gradient) {
  const Shape& s = layer.shape;
  std::vector<double> sums = zeros(s.channels * s.height * s.width * s.images);
  each_product(layer, [&](std::int64_t from, std::int64_t w, std::int64_t to) {
    sums[static_cast<std::size_t>(to)] += static_cast<double>(weight[w]) * static_cast<double>(out_gradient[from]);
  });
  store(sums, x_gradient);
}

void weight_gradient(const Layer& layer, const float* x, const float* out_gradient, float* weight_gradient) {
  std::vector<double> sums = zeros(layer.shape.filters * layer.shape.columns());
  each_product(layer, [&](std::int64_t out, std::int64_t to, std::int64_t from) {
    sums[static_cast<std::size_t>(to)] += static_cast<double>(out_gradient[out]) * static_cast<double>(x[from]);
  });
  store(sums, weight_gradient);
}

namespace {

// body(index in out, number of the tap, index in x) for every tap of every window, the windows' taps in order.
template <class Body>
void each_tap(const Pooling& p, const Body& body) {
  for (std::int64_t run = 0; run < p.out_height() * p.out_width() * p.channels; ++run) {
    const std::int64_t channel = run % p.channels;
    const std::int64_t y = run / p.channels / p.out_width(), x = run / p.channels % p.out_width();
    for (std::int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
      const std::int64_t in_y = y * p.stride_h - p.padding_h + tap / p.kernel_w;
      const std::int64_t in_x = x * p.stride_w - p.padding_w + tap % p.kernel_w;
      if (in_y < 0 || in_y >= p.height || in_x < 0 || in_x >= p.width) continue;
      for (std::int64_t image = 0; image < p.images; ++image) {
        body(run * p.images + image, static_cast<std::uint8_t>(tap),
             ((in_y * p.width + in_x) * p.channels + channel) * p.images + image);
      }
    }
  }
}

}  // namespace

void maxima(const Pooling& pooling, const float* x, float* out, std::uint8_t* at) {
  std::vector<bool> seen(
      static_cast<std::size_t>(pooling.channels * pooling.out_height() * pooling.out_width() * pooling.images));
  each_tap(pooling, [&](std::int64_t to, std::uint8_t tap, std::int64_t from) {
    if (seen[static_cast<std::size_t>(to)] && !(x[from] > out[to]) && !std::isnan(x[from])) return;
    seen[static_cast<std::size_t>(to)] = true;
    out[to] = x[from];
    at[to] = tap;
  });
}

void maxima_gradient(const Pooling& pooling, const float* out_gradient, const std::uint8_t* at, float* x_gradient) {
  std::fill_n(x_gradient, pooling.channels * pooling.height * pooling.width * pooling.images, 0.0F);
  each_tap(pooling, [&](std::int64_t from, std::uint8_t tap, std::int64_t to) {
    if (at[from] == tap) x_gradient[to] += out_gradient[from];
  });
}

namespace {

// body(place of a value) for all values of a channel.
template <class Body>
void each_value(const Pixels& of, std::int64_t channel, const Body& body) {
  for (std::int64_t pixel = 0; pixel < of.pixels; ++pixel) {
    for (std::int64_t image = 0; image < of.images; ++image) body((pixel * of.channels + channel) * of.images + image);
  }
}

}  // namespace

void normalise(const Normalisation& n, const float* x, double eps, float* out, float* mean, float* variance) {
  const auto count = static_cast<double>(n.of.pixels * n.of.images);
  for (std::int64_t c = 0; c < n.of.channels; ++c) {
    double sum = 0, squares = 0;
    each_value(n.of, c, [&](std::int64_t i) { sum += static_cast<double>(x[i]); });
    const double middle = sum / count;
    each_value(n.of, c, [&](std::int64_t i) { squares += std::pow(static_cast<double>(x[i]) - middle, 2); });
    mean[c] = static_cast<float>(middle);
    variance[c] = static_cast<float>(squares / count);
    const double scale =
        (n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c])) / std::sqrt(squares / count + eps);
    const double bias = n.bias == nullptr ? 0.0 : static_cast<double>(n.bias[c]);
    each_value(n.of, c, [&](std::int64_t i) {
      out[i] = static_cast<float>((static_cast<double>(x[i]) - middle) * scale + bias);
    });
  }
}

void normalise_gradient(const Normalisation& n, const float* x, const float* out_gradient, const float* mean,
                        const float* variance, double eps, float* x_gradient, float* weight_gradient,
                        float* bias_gradient) {
  const auto count = static_cast<double>(n.of.pixels * n.of.images);
  for (std::int64_t c = 0; c < n.of.channels; ++c) {
    const double middle = static_cast<double>(mean[c]), scale = 1 / std::sqrt(static_cast<double>(variance[c]) + eps);
    const auto normal = [&](std::int64_t i) { return (static_cast<double>(x[i]) - middle) * scale; };
    double sum = 0, products = 0;
    each_value(n.of, c, [&](std::int64_t i) {
      sum += static_cast<double>(out_gradient[i]);
      products += static_cast<double>(out_gradient[i]) * normal(i);
    });
    bias_gradient[c] = static_cast<float>(sum);
    weight_gradient[c] = static_cast<float>(products);
    const double weight = n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c]);
    each_value(n.of, c, [&](std::int64_t i) {
      x_gradient[i] = static_cast<float>(
          weight * scale * (static_cast<double>(out_gradient[i]) - sum / count - normal(i) * products / count));
    });
  }
}

}  // namespace acf::training::reference
