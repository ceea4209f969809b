#include "training/training.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "core/isa.h"
#include "tests/tensors.h"
#include "tests/testing.h"

namespace acf::training {
namespace {

using conv::between;
using conv::gaussian;
using conv::Random;

Layer random_layer(Random& random) {
  for (;;) {
    Shape s;
    s.images = between(random, 1, 5) == 1 ? between(random, 100, 200) : between(random, 1, 40);
    const bool deep = between(random, 1, 8) == 1;  // more terms than are multiplied at a time
    s.channels = deep ? between(random, 60, 90) : between(random, 1, 9);
    s.filters = between(random, 1, 34);
    s.height = between(random, 1, deep ? 4 : 12);
    s.width = between(random, 1, deep ? 4 : 12);
    s.kernel_h = between(random, 1, 5);
    s.kernel_w = between(random, 1, 5);
    s.stride_h = between(random, 1, 3);
    s.stride_w = between(random, 1, 3);
    s.dilation_h = between(random, 1, 2);
    s.dilation_w = between(random, 1, 2);
    s.padding_h = between(random, 0, 3);
    s.padding_w = between(random, 0, 3);
    if (s.height + 2 * s.padding_h <= s.dilation_h * (s.kernel_h - 1)) continue;
    if (s.width + 2 * s.padding_w <= s.dilation_w * (s.kernel_w - 1)) continue;
    const auto some = [&](std::int64_t count) {
      const std::int64_t percent = between(random, 0, 2) * 50;
      std::vector<std::int32_t> numbers;
      for (std::int64_t i = 0; i < count; ++i) {
        if (between(random, 1, 100) <= percent) numbers.push_back(static_cast<std::int32_t>(i));
      }
      return numbers;
    };
    return {s, some(s.filters), some(s.columns())};
  }
}

// Each value is a sum of products of `terms` Gaussian numbers.
bool close(const std::vector<float>& a, const std::vector<float>& b, std::int64_t terms) {
  const double limit = 1e-6 * (10 + std::sqrt(static_cast<double>(terms)) * 8);
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](float x, float y) {
    return std::abs(static_cast<double>(x) - static_cast<double>(y)) <= limit;
  });
}

ACF_TEST(all_three_are_the_reference) {
  Random random(3);
  for (int problem = 0; problem < 150; ++problem) {
    const Layer layer = random_layer(random);
    const Shape& s = layer.shape;
    const std::int64_t pixels = s.out_height() * s.out_width() * s.images;
    const std::vector<float> x = gaussian(random, s.channels * s.height * s.width * s.images),
                             w = gaussian(random, s.filters * s.columns()), bias = gaussian(random, s.filters),
                             g = gaussian(random, s.filters * pixels);
    const float* const start = problem % 2 == 0 ? bias.data() : nullptr;
    std::vector<float> out(g.size()), x_gradient(x.size()), w_gradient(w.size());
    reference::forward(layer, x.data(), w.data(), start, out.data());
    reference::input_gradient(layer, g.data(), w.data(), x_gradient.data());
    reference::weight_gradient(layer, x.data(), g.data(), w_gradient.data());
    for (const Isa isa : supported_isas()) {
      std::vector<float> sums[2];
      for (const int threads : {1, 3}) {
        // What was there before must not matter.
        std::vector<float> a(g.size(), NAN), b(x.size(), NAN), c(w.size(), NAN), d(bias.size(), NAN);
        forward(layer, x.data(), w.data(), start, a.data(), threads, isa);
        EXPECT(close(a, out, s.columns()));
        input_gradient(layer, g.data(), w.data(), b.data(), threads, isa);
        EXPECT(close(b, x_gradient, s.filters * s.taps()));
        weight_gradient(layer, x.data(), g.data(), c.data(), threads, isa);
        EXPECT(close(c, w_gradient, pixels));
        const Pixels of = {s.out_height() * s.out_width(), s.filters, s.images};
        channel_sums(of, g.data(), d.data(), threads, isa);
        std::vector<double> totals(bias.size());
        for (std::size_t i = 0; i < g.size(); ++i) {
          totals[i / static_cast<std::size_t>(s.images) % totals.size()] += static_cast<double>(g[i]);
        }
        for (std::size_t f = 0; f < totals.size(); ++f) {
          EXPECT(std::abs(totals[f] - static_cast<double>(d[f])) <= 1e-5 * (1 + std::sqrt(pixels)));
        }
        for (const auto* part : {&a, &b, &c, &d})
          sums[threads / 2].insert(sums[threads / 2].end(), part->begin(), part->end());
      }
      EXPECT(sums[0] == sums[1]);  // the same bits for every number of threads
    }
  }
}

ACF_TEST(pooling_is_the_reference) {
  Random random(5);
  for (int problem = 0; problem < 100; ++problem) {
    Pooling p;
    p.images = between(random, 1, 80);
    p.channels = between(random, 1, 5);
    p.kernel_h = between(random, 1, 4);
    p.kernel_w = between(random, 1, 4);
    p.padding_h = between(random, 0, p.kernel_h / 2);
    p.padding_w = between(random, 0, p.kernel_w / 2);
    p.height = between(random, p.kernel_h, 10);
    p.width = between(random, p.kernel_w, 10);
    p.stride_h = between(random, 1, 4);
    p.stride_w = between(random, 1, 4);
    std::vector<float> x = gaussian(random, p.channels * p.height * p.width * p.images);
    for (float& value : x) {  // ties, infinities and NaN
      const std::int64_t kind = between(random, 0, 9);
      if (kind < 6) value = static_cast<float>(kind % 3);
      if (kind == 6) value = -INFINITY;
      if (kind == 7 && problem % 3 == 0) value = NAN;
    }
    const std::vector<float> g = gaussian(random, p.channels * p.out_height() * p.out_width() * p.images);
    std::vector<float> largest(g.size()), gradient(x.size());
    std::vector<std::uint8_t> at(g.size());
    reference::maxima(p, x.data(), largest.data(), at.data());
    reference::maxima_gradient(p, g.data(), at.data(), gradient.data());
    for (const Isa isa : supported_isas()) {
      for (const int threads : {1, 3}) {
        std::vector<float> a(g.size()), b(x.size(), NAN);
        std::vector<std::uint8_t> number(g.size());
        maxima(p, x.data(), a.data(), number.data(), threads, isa);
        EXPECT(number == at);
        EXPECT(std::equal(a.begin(), a.end(), largest.begin(),
                          [](float u, float v) { return u == v || (std::isnan(u) && std::isnan(v)); }));
        maxima_gradient(p, g.data(), at.data(), b.data(), threads, isa);
        EXPECT(close(b, gradient, 16));
      }
    }
  }
}

ACF_TEST(normalisation_is_the_reference) {
  Random random(7);
  for (int problem = 0; problem < 60; ++problem) {
    Normalisation n;
    n.of = {between(random, 1, problem % 5 == 0 ? 300 : 10), between(random, 1, 6), between(random, 1, 140)};
    const std::int64_t count = n.of.pixels * n.of.images;
    std::vector<float> x = gaussian(random, n.of.values());
    for (float& value : x) value = value * 3 + 5;
    const std::vector<float> g = gaussian(random, n.of.values()), weight = gaussian(random, n.of.channels),
                             bias = gaussian(random, n.of.channels);
    if (problem % 3 != 0) {
      n.weight = weight.data();
      n.bias = bias.data();
    }
    const auto channels = static_cast<std::size_t>(n.of.channels);
    std::vector<float> out(x.size()), mean(channels), variance(channels), x_gradient(x.size()), w_gradient(channels),
        b_gradient(channels);
    reference::normalise(n, x.data(), 1e-2, out.data(), mean.data(), variance.data());
    reference::normalise_gradient(n, x.data(), g.data(), mean.data(), variance.data(), 1e-2, x_gradient.data(),
                                  w_gradient.data(), b_gradient.data());
    for (const Isa isa : supported_isas()) {
      for (const int threads : {1, 3}) {
        std::vector<float> a(x.size(), NAN), m(channels), v(channels), b(x.size(), NAN), c(channels), d(channels);
        normalise(n, x.data(), 1e-2, a.data(), m.data(), v.data(), threads, isa);
        EXPECT(close(m, mean, 16) && close(v, variance, 1000) && close(a, out, 1000));
        normalise_gradient(n, x.data(), g.data(), mean.data(), variance.data(), 1e-2, b.data(), c.data(), d.data(),
                           threads, isa);
        EXPECT(close(b, x_gradient, 4000) && close(c, w_gradient, 10 * count) && close(d, b_gradient, count));
      }
    }
  }
}

ACF_TEST(wrong_pooling_is_refused) {
  Pooling p;
  p.images = p.channels = p.height = p.width = 2;
  p.kernel_h = 3;
  EXPECT_THROWS(check(p), std::invalid_argument, "the window must fit into the padded input, got 2x2 pixels");
  p.padding_h = 2;
  EXPECT_THROWS(check(p), std::invalid_argument, "padding must be from 0 to half the window, got 2, 0");
  p.kernel_h = 257;
  EXPECT_THROWS(check(p), std::invalid_argument, "a window must have at most 256 taps, got 257x1");
  p.stride_w = 0;
  EXPECT_THROWS(check(p), std::invalid_argument, "stride must be from 1 to 2147483647, got 0");
}

ACF_TEST(wrong_layers_are_refused) {
  Shape s;
  s.images = s.channels = s.filters = 2;
  s.height = s.width = 3;
  const auto layer = [&](std::vector<std::int32_t> filters, std::vector<std::int32_t> columns) {
    return Layer(s, std::move(filters), std::move(columns));
  };
  EXPECT_THROWS(layer({1, 1}, {}), std::invalid_argument,
                "kept filters must rise and be from 0 to 1, got 1 at place 1");
  EXPECT_THROWS(layer({0}, {2}), std::invalid_argument, "kept columns must rise and be from 0 to 1, got 2 at place 0");
  EXPECT_THROWS(layer({-1}, {}), std::invalid_argument, "got -1 at place 0");
  s.kernel_w = 4;
  EXPECT_THROWS(check(s), std::invalid_argument, "the kernel must fit into the padded input, got 3x3 pixels");
  s.kernel_w = 0;
  EXPECT_THROWS(check(s), std::invalid_argument, "kernel width must be from 1 to 2147483647, got 0");
  s.kernel_w = 1;
  s.padding_h = -1;
  EXPECT_THROWS(check(s), std::invalid_argument, "padding must be from 0 to 2147483647, got -1");
  s.padding_h = 0;
  s.images = std::int64_t{1} << 30;
  EXPECT_THROWS(check(s), std::invalid_argument, "tensors must have less than 2^31 values");

  s = {};
  s.images = s.channels = s.filters = s.height = s.width = s.kernel_w = 1;
  s.kernel_h = 3;
  s.padding_h = s.dilation_h = std::int64_t{1} << 30;
  float value = 0;
  EXPECT_THROWS(forward({s, {0}, {0}}, &value, &value, nullptr, &value, 1, Isa::generic), std::invalid_argument,
                "a kernel must reach over less than 2^31 values, got 2147483649 pixels of 1 channels of 8 images");
}

}  // namespace
}  // namespace acf::training
