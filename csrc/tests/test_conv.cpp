// The kernels of every ISA, orientation and window against a naive loop in double, on memory that ends exactly where
// the layout ends.
#include "conv/conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "conv/packed.h"
#include "core/isa.h"
#include "tests/tensors.h"
#include "tests/testing.h"

namespace acf::conv {
namespace {

constexpr double kWinogradError = 16;  // roundings of the largest sum

struct Problem {
  Shape shape;
  std::int64_t images = 1;
  std::vector<std::int64_t> columns;
  Epilogue epilogue;
  bool residual = false;
  int values = 0;  // different weights of a filter; 0: as they come
};

std::int64_t weight_count(const Problem& problem) {
  return problem.shape.filters / problem.shape.groups * static_cast<std::int64_t>(problem.columns.size());
}

// All ways in which an ISA can compute the problem.
std::vector<Plan> plans(const Problem& problem, const Pitch& pitch, Isa isa) {
  const auto count = static_cast<std::int64_t>(problem.columns.size());
  std::vector<Plan> all = {plan(problem.shape, pitch, problem.images, count, isa),
                           plan(problem.shape, pitch, problem.images, count, isa, Method::filters_in_lanes)};
  Plan filters = all[1];
  for (filters.code_bits = 1; filters.code_bits <= kMaxCodeBits; ++filters.code_bits) {
    if (problem.values == 0 || problem.values > 1 << filters.code_bits || problem.shape.groups > 1) continue;
    for (const std::int64_t pixels : {std::int64_t{1}, filters.tile_pixels}) {
      all.push_back(filters);
      all.back().tile_pixels = pixels;
    }
  }
  filters.code_bits = 0;
  for (filters.tile_pixels = 1; filters.tile_pixels <= kMaxPixels && max_blocks(kernels(isa), filters.tile_pixels) > 0;
       ++filters.tile_pixels) {
    all.push_back(filters);
  }
  if (winograd_fits(all[1])) {
    Plan winograd = plan(problem.shape, pitch, problem.images, count, isa, Method::winograd_tiles_in_lanes);
    for (const int pieces : {1, 2, 4}) {
      if (kernels(isa).lanes < 4 * pieces) continue;
      winograd.pieces = pieces;
      all.push_back(winograd);
    }
    if (winograd_is_few(all[1])) {
      Plan few = plan(problem.shape, pitch, problem.images, count, isa, Method::winograd_filters_in_lanes);
      all.push_back(few);
      few.tile_pixels = 1;
      few.filter_tiles = (problem.shape.filters + kBlock - 1) / kBlock;
      all.push_back(few);
    }
    Plan one_vector = winograd;  // with a block of one
    one_vector.tile_vectors = one_vector.block_vectors = 1;
    all.push_back(one_vector);
  }
  if (problem.shape.stride_w > 2) return all;
  Plan pixels = plan(problem.shape, pitch, problem.images, count, isa, Method::pixels_in_lanes);
  const std::int64_t group_filters = problem.shape.filters / problem.shape.groups;
  for (const Window window : {Window::flat, Window::rows, Window::halves, Window::depthwise}) {
    pixels.window = window;
    if (!window_fits(pixels)) continue;
    const std::int64_t most = max_filters(kernels(isa), load_of(pixels)), fewest = (group_filters + most - 1) / most;
    for (const std::int64_t tiles : {fewest, std::min(fewest + 1, group_filters)}) {
      pixels.filter_tiles = tiles;
      all.push_back(pixels);
    }
  }
  return all;
}

std::string describe(const Problem& problem, const Plan& plan) {
  const Shape& s = problem.shape;
  std::ostringstream text;
  text << isa_name(plan.isa) << " method " << static_cast<int>(plan.method) << " window "
       << static_cast<int>(plan.window) << " tiles " << plan.filter_tiles << "," << plan.tile_pixels << " code bits "
       << plan.code_bits << " images " << problem.images << " " << s.channels << "x" << s.height << "x" << s.width
       << " -> " << s.filters << " groups " << s.groups << " kernel " << s.kernel_h << "x" << s.kernel_w << " stride "
       << s.stride_h << "," << s.stride_w << " dilation " << s.dilation_h << "," << s.dilation_w << " padding "
       << s.padding.top << "," << s.padding.left << "," << s.padding.bottom << "," << s.padding.right << " columns "
       << problem.columns.size() << " activation " << static_cast<int>(problem.epilogue.activation) << " residual "
       << problem.residual;
  return text.str();
}

void run_with_scratch(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
                      const Pitch& out_pitch, const Epilogue& epilogue, int threads) {
  const auto floats = static_cast<std::size_t>(scratch_size(plan));
  AlignedBytes scratch(floats * sizeof(float));
  std::fill_n(static_cast<float*>(scratch.data()), floats, std::numeric_limits<float>::quiet_NaN());
  run(plan, packed, images, in, out, out_pitch, epilogue, static_cast<float*>(scratch.data()), threads);
}

// Those that a filter has first are the values that its others are chosen from.
void take_few_values(Random& random, const Problem& problem, std::vector<float>& weights) {
  const auto count = static_cast<std::int64_t>(problem.columns.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i) % count;
    if (at >= problem.values)
      weights[i] = weights[i - static_cast<std::size_t>(at - between(random, 0, problem.values - 1))];
  }
}

// Every plan of every ISA gives the reference within rounding, leaves the halo alone, and all of Winograd and all
// others that fuse multiply and add give the same bits.
void check(Random& random, const Problem& problem) {
  const Shape& s = problem.shape;
  const std::int64_t out_height = s.out_height(), out_width = s.out_width();
  Tensor in(problem.images, s.channels, s.height, s.width, s.padding);
  in.fill(random);
  const Padding out_padding = {between(random, 0, 2), between(random, 0, 2), between(random, 0, 2),
                               between(random, 0, 2)};
  Tensor residual(problem.images, s.filters, out_height, out_width, {0, between(random, 0, 1), 0, 0});
  residual.fill(random);
  std::vector<float> weights = gaussian(random, weight_count(problem));
  const std::vector<float> bias = gaussian(random, s.filters);
  if (problem.values > 0) take_few_values(random, problem, weights);
  const float* bias_data = between(random, 0, 4) == 0 ? nullptr : bias.data();
  Epilogue epilogue = problem.epilogue;
  if (problem.residual) {
    epilogue.residual = residual.data();
    epilogue.residual_pitch = residual.layout.pitch;
  }
  const auto size = static_cast<std::size_t>(problem.images * s.filters * out_height * out_width);
  std::vector<double> expected(size), sums(size);
  const auto count = static_cast<std::int64_t>(problem.columns.size());
  reference::run(s, in.layout.pitch, count, problem.columns.data(), weights.data(), bias_data, problem.images,
                 in.data(), epilogue, expected.data(), sums.data());

  const double largest = *std::max_element(sums.begin(), sums.end());
  std::vector<float> fused[2];
  for (const Isa isa : supported_isas()) {
    for (const Plan& way : plans(problem, in.layout.pitch, isa)) {
      AlignedBytes packed(packed_size(way));
      pack(way, problem.columns.data(), weights.data(), bias_data, packed.data());
      Tensor out(problem.images, s.filters, out_height, out_width, out_padding);
      const std::vector<float> before = out.memory;
      run_with_scratch(way, packed.data(), problem.images, in.data(), out.data(), out.layout.pitch, epilogue,
                       static_cast<int>(between(random, 1, 3)));

      const std::vector<float> got = out.interior();
      // One rounding a term and a few in the activation, whose slope is at most 1.1.
      const double unit = 6e-8, roundings = static_cast<double>(count + 3);
      const bool winograd = is_winograd(way.method);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < size; ++i) {
        // The errors of Winograd are those of all inputs of a tile.
        const double terms = winograd ? kWinogradError * largest : roundings * sums[i];
        const double bound = 1.1 * unit * terms + 8 * unit * (1 + std::abs(expected[i]));
        if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= bound)) ++wrong;
      }
      EXPECT_EQ(std::to_string(wrong) + " wrong of " + describe(problem, way), "0 wrong of " + describe(problem, way));

      out.each([](float& value) { value = std::numeric_limits<float>::quiet_NaN(); });
      const bool halo_untouched = std::memcmp(out.memory.data(), before.data(), before.size() * sizeof(float)) == 0;
      EXPECT_EQ(halo_untouched ? "" : "halo written by " + describe(problem, way), "");

      if (isa == Isa::generic) continue;
      std::vector<float>& same = fused[winograd ? 1 : 0];
      if (same.empty()) same = got;
      const bool same_bits = std::memcmp(got.data(), same.data(), size * sizeof(float)) == 0;
      EXPECT_EQ(same_bits ? "" : "other bits from " + describe(problem, way), "");
    }
  }
}

bool fits(const Shape& shape) { return shape.out_height() >= 1 && shape.out_width() >= 1; }

ACF_TEST(random_problems_equal_the_reference) {
  Random random(1);
  for (int i = 0; i < 250; ++i) {
    Problem problem;
    problem.shape = random_shape(random, 17);
    problem.images = between(random, 0, 1) == 0 ? 1 : 3;
    problem.columns = random_columns(random, problem.shape,
                                     std::vector<double>{1.0, 1.0, 0.5, 0.1, 0.0}[static_cast<std::size_t>(i % 5)]);
    problem.epilogue.activation = kActivations[i % 9];
    problem.epilogue.slope = 0.2f;
    problem.residual = i % 2 == 0;
    check(random, problem);
  }
}

ACF_TEST(every_number_of_filters_equals_the_reference) {
  Random random(2);
  for (const std::int64_t filters : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 33, 37, 64, 101}) {
    Problem problem;
    problem.shape.channels = 5;
    problem.shape.height = 9;
    problem.shape.width = 17;
    problem.shape.filters = filters;
    problem.shape.kernel_h = problem.shape.kernel_w = 3;
    problem.shape.padding = {1, 1, 1, 1};
    problem.images = 3;
    problem.columns = random_columns(random, problem.shape, filters % 2 == 0 ? 1.0 : 0.4);
    problem.epilogue.activation = filters % 3 == 0 ? Activation::silu : Activation::relu;
    problem.residual = filters % 4 < 2;
    check(random, problem);
    problem.shape.stride_h = problem.shape.stride_w = 2;
    check(random, problem);
  }
}

// With a stride beyond the row pitch the pixels of a tile go to and fro in memory.
ACF_TEST(wide_strides_and_paddings_equal_the_reference) {
  Random random(9);
  for (std::int64_t width = 1; width <= 4; ++width) {
    for (const std::int64_t stride : {1, 2, 3}) {
      Problem problem;
      problem.shape.channels = 2;
      problem.shape.height = 7;
      problem.shape.width = width;
      problem.shape.filters = 19;
      problem.shape.kernel_h = 2;
      problem.shape.stride_w = stride;
      problem.shape.padding = {1, 3, 0, 3};
      problem.columns = random_columns(random, problem.shape, 1.0);
      check(random, problem);
    }
  }
}

// Sizes whose vectors are full, half full, cross rows and images; planes of a few pixels.
ACF_TEST(every_size_of_plane_equals_the_reference) {
  Random random(3);
  for (std::int64_t width = 1; width <= 40; ++width) {
    Problem problem;
    problem.shape.channels = 3;
    problem.shape.height = width <= 8 ? width : 1 + width % 5;
    problem.shape.width = width;
    problem.shape.filters = 1 + width % 6;
    problem.shape.kernel_h = problem.shape.kernel_w = 3;
    problem.shape.padding = {1, 1, 1, 1};
    problem.images = 1 + width % 3;
    problem.columns = random_columns(random, problem.shape, 1.0);
    check(random, problem);
    problem.shape.stride_h = problem.shape.stride_w = 2;
    check(random, problem);
  }
}

ACF_TEST(linear_layers_equal_the_reference) {
  Random random(4);
  for (const std::int64_t images : {1, 2, 3, 5, 7, 8, 9, 33}) {
    for (const std::int64_t features : {1, 10, 16, 131, 150}) {
      Problem problem;
      problem.shape.channels = 77;
      problem.shape.filters = features;
      problem.images = images;
      problem.columns = random_columns(random, problem.shape, features % 2 == 0 ? 1.0 : 0.3);
      problem.epilogue.activation = images % 2 == 0 ? Activation::tanh : Activation::relu;
      problem.residual = images % 3 == 0;
      check(random, problem);
    }
  }
}

ACF_TEST(weights_of_few_values_equal_the_reference) {
  Random random(11);
  for (const int values : {1, 2, 3, 4}) {
    for (const std::int64_t filters : {1, 15, 16, 17, 130, 301}) {
      for (const std::int64_t size : {1, 2, 4, 9}) {
        Problem problem;
        problem.values = values;
        problem.shape.channels = size == 1 ? 333 : 61;  // more than a chunk
        problem.shape.filters = filters;
        problem.shape.height = problem.shape.width = size;
        problem.shape.kernel_h = problem.shape.kernel_w = size == 1 ? 1 : 3;
        if (size > 1) problem.shape.padding = {1, 1, 1, 1};
        problem.images = between(random, 1, 2);
        problem.columns = random_columns(random, problem.shape, filters % 2 == 0 ? 1.0 : 0.4);
        problem.epilogue.activation = size % 2 == 0 ? Activation::relu : Activation::silu;
        problem.residual = filters % 3 == 0;
        check(random, problem);
      }
    }
  }
}

ACF_TEST(codes_are_counted_and_chosen_for_large_layers) {
  Shape shape;
  shape.channels = 1024;
  shape.filters = 512;
  std::vector<float> weights(1024 * 512);
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = i % 1024 == 0 ? 1.0f : -0.5f;
  EXPECT_EQ(code_bits(512, 1024, weights.data()), 1);
  weights[5] = -weights[5];
  EXPECT_EQ(code_bits(512, 1024, weights.data()), 2);
  weights[6] = 0.0f;
  EXPECT_EQ(code_bits(512, 1024, weights.data()), 2);
  weights[7] = -0.0f;
  EXPECT_EQ(code_bits(512, 1024, weights.data()), 0);
  for (const Isa isa : supported_isas()) {
    if (isa == Isa::generic) continue;
    const Plan coded = plan(shape, {1, 1, 1024}, 1, 1024, isa, 1);
    EXPECT_EQ(coded.code_bits, 1);
    EXPECT_EQ(plan(shape, {1, 1, 1024}, 1, 1024, isa).code_bits, 0);
    EXPECT_EQ(plan(shape, {1, 1, 1024}, 4096, 1024, isa, 1).code_bits, 0);
    AlignedBytes packed(packed_size(coded));
    EXPECT_EQ(packed_size(coded) < 200'000, true);
    std::vector<std::int64_t> every(1024);
    std::iota(every.begin(), every.end(), 0);
    EXPECT_THROWS(pack(coded, every.data(), weights.data(), nullptr, packed.data()), std::invalid_argument,
                  "filter 0 has more values than codes of 1 bits stand for");
  }
  Shape small = shape;
  small.channels = 64;
  EXPECT_EQ(plan(small, {1, 1, 64}, 1, 64, supported_isas().back(), 1).code_bits, 0);
}

ACF_TEST(depthwise_layers_equal_the_reference) {
  Random random(5);
  for (const std::int64_t kernel : {3, 5}) {
    for (const std::int64_t stride : {1, 2}) {
      for (const std::int64_t multiplier : {1, 2}) {
        Problem problem;
        problem.shape.channels = problem.shape.groups = 19;
        problem.shape.filters = 19 * multiplier;
        problem.shape.height = 11;
        problem.shape.width = stride == 1 ? 29 : 37;
        problem.shape.kernel_h = problem.shape.kernel_w = kernel;
        problem.shape.stride_h = problem.shape.stride_w = stride;
        problem.shape.padding = {kernel / 2, kernel / 2, kernel / 2, kernel / 2};
        problem.images = 2;
        problem.columns = random_columns(random, problem.shape, multiplier == 1 ? 1.0 : 0.5);
        problem.epilogue.activation = Activation::relu6;
        check(random, problem);
        problem.residual = true;
        problem.epilogue.activation = Activation::hardswish;
        problem.shape.width = 5;
        check(random, problem);
      }
    }
  }
}

// Enough work for several tasks, and weights that are cut because they exceed the cache.
ACF_TEST(results_do_not_depend_on_the_threads) {
  Random random(6);
  for (const std::int64_t size : {4, 14}) {
    Problem problem;
    Shape& s = problem.shape;
    s.channels = size == 4 ? 200 : 24;
    s.filters = size == 4 ? 180 : 37;
    s.height = s.width = size;
    s.kernel_h = s.kernel_w = 3;
    s.padding = {1, 1, 1, 1};
    problem.images = 3;
    problem.columns = random_columns(random, s, 0.9);
    Tensor in(problem.images, s.channels, s.height, s.width, s.padding);
    in.fill(random);
    const std::vector<float> weights = gaussian(random, weight_count(problem));
    for (const Isa isa : supported_isas()) {
      std::vector<float> first[2];
      for (const Plan& way : plans(problem, in.layout.pitch, isa)) {
        AlignedBytes packed(packed_size(way));
        pack(way, problem.columns.data(), weights.data(), nullptr, packed.data());
        for (const int threads : {1, 2, 5}) {
          Tensor out(problem.images, s.filters, s.out_height(), s.out_width(), {});
          run_with_scratch(way, packed.data(), problem.images, in.data(), out.data(), out.layout.pitch, {}, threads);
          std::vector<float>& same = first[is_winograd(way.method) ? 1 : 0];
          if (same.empty()) same = out.interior();
          EXPECT(out.interior() == same);
        }
      }
    }
  }
}

// Strips that end in the middle, several blocks, threads that take blocks of their own and that share one.
ACF_TEST(winograd_equals_the_reference) {
  Random random(10);
  for (int i = 0; i < 60; ++i) {
    Problem problem;
    Shape& s = problem.shape;
    s.channels = between(random, 1, 20);
    s.filters = between(random, 1, 40);
    s.height = between(random, 1, 20);
    s.width = between(random, 1, i % 3 == 0 ? 70 : 20);
    s.kernel_h = s.kernel_w = 3;
    s.padding = {between(random, 0, 2), between(random, 0, 2), between(random, 0, 2), between(random, 0, 2)};
    if (!fits(s)) continue;
    problem.images = between(random, 1, 9);
    problem.columns = random_columns(random, s, i % 2 == 0 ? 1.0 : 0.3);
    problem.epilogue.activation = kActivations[i % 9];
    problem.residual = i % 4 < 2;
    check(random, problem);
  }
}

// What the weights do to an input of one, which shows every element of the transforms.
ACF_TEST(winograd_of_a_single_one_is_the_weights) {
  Shape s;
  s.height = s.width = 9;
  s.kernel_h = s.kernel_w = 3;
  s.padding = {1, 1, 1, 1};
  const std::vector<std::int64_t> columns = {0, 1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<float> weights = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  for (const Isa isa : supported_isas()) {
    for (std::int64_t at = 0; at < 81; ++at) {
      Tensor in(1, 1, 9, 9, s.padding), out(1, 1, 9, 9, {});
      in.each([](float& value) { value = 0; });
      in.at(0, 0, at / 9, at % 9) = 1;
      const Plan way = plan(s, in.layout.pitch, 1, 9, isa, Method::winograd_tiles_in_lanes);
      AlignedBytes packed(packed_size(way));
      pack(way, columns.data(), weights.data(), nullptr, packed.data());
      run_with_scratch(way, packed.data(), 1, in.data(), out.data(), out.layout.pitch, {}, 1);
      for (std::int64_t y = 0; y < 9; ++y) {
        for (std::int64_t x = 0; x < 9; ++x) {
          const std::int64_t kh = at / 9 - y + 1, kw = at % 9 - x + 1;
          const bool reached = kh >= 0 && kh < 3 && kw >= 0 && kw < 3;
          const float expected = reached ? weights[static_cast<std::size_t>(kh * 3 + kw)] : 0.0f;
          EXPECT(std::abs(out.at(0, 0, y, x) - expected) < 1e-5f);
        }
      }
    }
  }
}

ACF_TEST(residual_may_be_the_output) {
  Random random(7);
  Shape s;
  s.channels = 6;
  s.filters = 21;
  s.height = s.width = 9;
  const std::vector<float> weights = gaussian(random, s.filters * s.channels);
  const std::vector<std::int64_t> columns = {0, 1, 2, 3, 4, 5};
  Tensor in(2, s.channels, s.height, s.width, {});
  in.fill(random);
  for (const Isa isa : supported_isas()) {
    for (const Method method : {Method::pixels_in_lanes, Method::filters_in_lanes}) {
      const Plan way = plan(s, in.layout.pitch, 2, 6, isa, method);
      AlignedBytes packed(packed_size(way));
      pack(way, columns.data(), weights.data(), nullptr, packed.data());
      Tensor residual(2, s.filters, s.height, s.width, {1, 1, 1, 1}), apart = residual;
      residual.fill(random);
      Epilogue epilogue;
      epilogue.residual = residual.data();
      epilogue.residual_pitch = residual.layout.pitch;
      run_with_scratch(way, packed.data(), 2, in.data(), apart.data(), apart.layout.pitch, epilogue, 1);
      run_with_scratch(way, packed.data(), 2, in.data(), residual.data(), residual.layout.pitch, epilogue, 1);
      EXPECT(residual.interior() == apart.interior());
    }
  }
}

ACF_TEST(activations_hold_at_the_ends_of_their_range) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> values = {-infinity, -1e30f, -100, -88, -20, -3,    -1e-3f,   -0.0f,        0, 1e-3f, 1,
                                     3,         6,      20,   88,  100, 1e30f, infinity, std::nanf("")};
  const auto count = static_cast<std::int64_t>(values.size());
  Shape s;
  s.width = count;
  const float one = 1;
  const std::int64_t column = 0;
  for (const Isa isa : supported_isas()) {
    for (const Activation activation : kActivations) {
      Tensor in(1, 1, 1, count, {}), out(1, 1, 1, count, {});
      for (std::int64_t i = 0; i < count; ++i) in.at(0, 0, 0, i) = values[static_cast<std::size_t>(i)];
      const Plan way = plan(s, in.layout.pitch, 1, 1, isa);
      AlignedBytes packed(packed_size(way));
      pack(way, &column, &one, nullptr, packed.data());
      Epilogue epilogue;
      epilogue.activation = activation;
      run_with_scratch(way, packed.data(), 1, in.data(), out.data(), out.layout.pitch, epilogue, 1);
      for (std::int64_t i = 0; i < count; ++i) {
        const auto x = static_cast<double>(values[static_cast<std::size_t>(i)]);
        const auto y = static_cast<double>(out.at(0, 0, 0, i));
        const double expected = reference::activate(activation, 0.01f, x);
        if (std::isnan(x)) {
          EXPECT(std::isnan(y));
        } else if (std::isfinite(x)) {
          EXPECT(std::abs(y - expected) <= 1e-6 * std::max(1.0, std::abs(expected)));
        }
      }
    }
  }
}

// Tiles are cut into parts of two sizes: what fits for the larger must exist for the smaller.
ACF_TEST(smaller_tiles_exist) {
  for (const Isa isa : supported_isas()) {
    const Kernels& table = kernels(isa);
    for (int m = 1; m < kMaxPixels; ++m) EXPECT(max_blocks(table, m) >= max_blocks(table, m + 1));
    for (const Load load : {Load::stretch, Load::halves, Load::strided}) {
      for (int f = 1; f < kMaxFilters; ++f) EXPECT(max_vectors(table, load, f) >= max_vectors(table, load, f + 1));
    }
    EXPECT(max_blocks(table, 1) >= 1);
    EXPECT(max_vectors(table, Load::strided, 1) >= 1);
  }
}

ACF_TEST(halos_are_shared_and_cleared) {
  Random random(8);
  for (int i = 0; i < 100; ++i) {
    const Padding p = {between(random, 0, 3), between(random, 0, 3), between(random, 0, 3), between(random, 0, 3)};
    const std::int64_t height = between(random, 1, 40), width = between(random, 1, 40);
    Tensor tensor(2, 3, height, width, p);
    tensor.each([](float& value) { value = 1; });
    for (std::int64_t plane = 0; plane < 6; ++plane) {
      const float* data = &tensor.at(plane / 3, plane % 3, 0, 0);
      for (std::int64_t y = -p.top; y < height + p.bottom; ++y) {
        for (std::int64_t x = -p.left; x < width + p.right; ++x) {
          const bool inside = y >= 0 && y < height && x >= 0 && x < width;
          EXPECT_EQ(data[y * tensor.layout.pitch.row + x], inside ? 1.0f : 0.0f);
        }
      }
    }
    EXPECT(tensor.layout.pitch.plane < 2048 || tensor.layout.pitch.plane % 1024 != 0);
  }
}

ACF_TEST(what_cannot_be_computed_is_refused) {
  Shape s;
  s.channels = 4;
  s.height = s.width = 8;
  s.kernel_h = s.kernel_w = 3;
  s.padding = {1, 1, 1, 1};
  const Pitch pitch = layout(1, 4, 8, 8, s.padding).pitch;
  const Isa isa = Isa::generic;
  const auto with = [&](auto change) {
    Shape changed = s;
    change(changed);
    return changed;
  };
  EXPECT_THROWS(plan(with([](Shape& c) { c.stride_h = 0; }), pitch, 1, 36, isa), std::invalid_argument, "got 0");
  EXPECT_THROWS(plan(with([](Shape& c) { c.padding.left = -1; }), pitch, 1, 36, isa), std::invalid_argument, "got -1");
  EXPECT_THROWS(plan(with([](Shape& c) { c.groups = 3; }), pitch, 1, 36, isa), std::invalid_argument, "got 3");
  EXPECT_THROWS(plan(with([](Shape& c) { c.kernel_h = 11; }), pitch, 1, 36, isa), std::invalid_argument,
                "does not fit");
  EXPECT_THROWS(plan(s, pitch, 1, 37, isa), std::invalid_argument, "from 0 to 36, got 37");
  EXPECT_THROWS(plan(s, {8, 81, 324}, 1, 36, isa), std::invalid_argument,
                "at least the width and its padding, 9, got 8");
  EXPECT_THROWS(plan(s, {9, 80, 320}, 1, 36, isa), std::invalid_argument, "got 80");
  EXPECT_THROWS(plan(s, {9, std::int64_t{1} << 27, 1}, 1, 36, isa), std::invalid_argument, "elements");
  EXPECT_THROWS(plan(with([](Shape& c) { c.stride_w = 3; }), pitch, 1, 36, isa, Method::pixels_in_lanes),
                std::invalid_argument, "stride of 1 or 2, got 3");
  const Isa elsewhere = supported_isas().back() == Isa::neon ? Isa::avx2 : Isa::neon;
  EXPECT_THROWS(plan(s, pitch, 1, 36, elsewhere), std::invalid_argument, "cannot run the ISA");
}

ACF_TEST(weights_packed_for_another_plan_are_refused) {
  Shape s;
  s.channels = 4;
  s.height = s.width = 8;
  s.filters = 5;
  const Pitch pitch = layout(1, 4, 8, 8, {}).pitch;
  const std::vector<std::int64_t> columns = {0, 2, 3};
  const std::vector<float> weights(15, 1.0f);
  const Plan way = plan(s, pitch, 1, 3, Isa::generic);
  AlignedBytes packed(packed_size(way));
  pack(way, columns.data(), weights.data(), nullptr, packed.data());
  Tensor in(1, 4, 8, 8, {}), out(1, 5, 8, 8, {});
  const auto run_as = [&](const Plan& other) {
    run(other, packed.data(), 1, in.data(), out.data(), out.layout.pitch, {}, nullptr, 1);
  };
  run_as(way);
  Plan other = way;
  other.shape.height = 7;
  EXPECT_THROWS(run_as(other), std::invalid_argument, "of the same plan");
  static_cast<unsigned char*>(packed.data())[4] ^= 1;  // the version
  EXPECT_THROWS(run_as(way), std::invalid_argument, "of this version");
}

}  // namespace
}  // namespace acf::conv
