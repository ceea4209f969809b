// What tests of convolutions share: random numbers, and tensors in memory that ends exactly where the layout ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "conv/conv.h"

namespace acf::conv {

using Random = std::mt19937;

inline std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

inline std::vector<float> gaussian(Random& random, std::int64_t n) {
  std::normal_distribution<float> numbers;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& value : values) value = numbers(random);
  values.shrink_to_fit();
  return values;
}

// Of any sizes that fit, with up to `filters` filters in a group; now and then a wide one.
inline Shape random_shape(Random& random, std::int64_t filters) {
  for (;;) {
    Shape s;
    s.groups = between(random, 0, 3) == 0 ? between(random, 2, 4) : 1;
    s.channels = s.groups * between(random, 1, 9);
    s.filters = s.groups * between(random, 1, filters);
    s.height = between(random, 1, 13);
    s.width = between(random, 1, 13) + (between(random, 0, 4) == 0 ? 20 : 0);
    s.kernel_h = between(random, 1, 5);
    s.kernel_w = between(random, 1, 5);
    s.stride_h = between(random, 1, 3);
    s.stride_w = between(random, 0, 1) == 0 ? s.stride_h : between(random, 1, 3);
    s.dilation_h = between(random, 1, 2);
    s.dilation_w = between(random, 1, 2);
    s.padding = {between(random, 0, 3), between(random, 0, 3), between(random, 0, 3), between(random, 0, 3)};
    if (s.out_height() >= 1 && s.out_width() >= 1) return s;
  }
}

// A tensor in memory of its own, misaligned by one float. What is neither interior nor halo is NaN.
struct Tensor {
  std::int64_t images, channels, height, width;
  Layout layout;
  std::vector<float> memory;

  Tensor(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w, const Padding& padding)
      : images(n), channels(c), height(h), width(w), layout(conv::layout(n, c, h, w, padding)) {
    memory.assign(static_cast<std::size_t>(layout.size + 1), std::numeric_limits<float>::quiet_NaN());
    memory.shrink_to_fit();
    clear_halo(data(), layout, n, c, h, w);
    std::fill(memory.end() - kSlack, memory.end(), std::numeric_limits<float>::quiet_NaN());
  }
  float* data() { return memory.data() + 1 + layout.before; }
  float& at(std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t x) {
    return data()[n * layout.pitch.image + c * layout.pitch.plane + y * layout.pitch.row + x];
  }
  template <class Body>
  void each(Body body) {
    for (std::int64_t n = 0; n < images; ++n) {
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t y = 0; y < height; ++y) {
          for (std::int64_t x = 0; x < width; ++x) body(at(n, c, y, x));
        }
      }
    }
  }
  void fill(Random& random) {
    std::normal_distribution<float> numbers;
    each([&](float& value) { value = numbers(random); });
  }
  std::vector<float> interior() {
    std::vector<float> values;
    each([&](float& value) { values.push_back(value); });
    return values;
  }
};

inline std::vector<std::int64_t> random_columns(Random& random, const Shape& shape, double share) {
  std::vector<std::int64_t> columns;
  std::uniform_real_distribution<double> uniform;
  for (std::int64_t k = 0; k < shape.columns(); ++k) {
    if (uniform(random) < share) columns.push_back(k);
  }
  return columns;
}

struct AlignedBytes {
  explicit AlignedBytes(std::size_t bytes) : memory(bytes + kAlignment) {}
  void* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (kAlignment - address % kAlignment) % kAlignment;
  }
  std::vector<unsigned char> memory;
};

inline constexpr Activation kActivations[] = {
    Activation::none,      Activation::relu,    Activation::relu6, Activation::leaky, Activation::hardsigmoid,
    Activation::hardswish, Activation::sigmoid, Activation::silu,  Activation::tanh,  Activation::gelu};

}  // namespace acf::conv
