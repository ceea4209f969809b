// The kernels of every unit against naive loops: of integers bit by bit, of bfloat16 within the rounding of the sums.
#include "narrow/narrow.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/isa.h"
#include "narrow/bytes.h"
#include "narrow/depthwise.h"
#include "tests/tensors.h"
#include "tests/testing.h"

namespace acf::narrow {
namespace {

using conv::Activation;
using conv::AlignedBytes;
using conv::between;
using conv::gaussian;
using conv::Random;
using conv::random_columns;
using conv::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

struct Problem {
  conv::Shape shape;
  std::int64_t images = 1;
  double share = 1;  // of columns
  conv::Epilogue epilogue;
  bool residual = false;
};

std::string describe(const Problem& problem, const Plan& way) {
  const conv::Shape& s = problem.shape;
  std::ostringstream text;
  text << unit_name(way.unit) << " reading " << static_cast<int>(way.reading) << " images " << problem.images << " "
       << s.channels << "x" << s.height << "x" << s.width << " -> " << s.filters << " groups " << s.groups << " kernel "
       << s.kernel_h << "x" << s.kernel_w << " stride " << s.stride_h << "," << s.stride_w << " dilation "
       << s.dilation_h << "," << s.dilation_w << " padding " << s.padding.top << "," << s.padding.left << ","
       << s.padding.bottom << "," << s.padding.right << " share " << problem.share << " residual " << problem.residual;
  return text.str();
}

// A problem with its data, and what it should give.
struct Case {
  Case(Random& random, const Problem& given)
      : problem(given),
        in(given.images, given.shape.channels, given.shape.height, given.shape.width, given.shape.padding),
        residual(given.images, given.shape.filters, given.shape.out_height(), given.shape.out_width(), {0, 1, 0, 0}),
        columns(random_columns(random, given.shape, given.share)),
        bias(gaussian(random, given.shape.filters)),
        out_padding{between(random, 0, 2), between(random, 0, 2), between(random, 0, 2), between(random, 0, 2)} {
    in.fill(random);
    residual.fill(random);
    weights = gaussian(random, given.shape.filters / given.shape.groups * static_cast<std::int64_t>(columns.size()));
    epilogue = given.epilogue;
    if (given.residual) {
      epilogue.residual = residual.data();
      epilogue.residual_pitch = residual.layout.pitch;
    }
  }

  // On every unit, in every way.
  std::vector<Plan> planned(Number number) const {
    std::vector<Plan> all;
    for (const Unit unit : units(active_isa(), number)) {
      const std::vector<Plan> ways =
          plans(problem.shape, in.layout.pitch, problem.images, count(), columns.data(), number, unit);
      all.insert(all.end(), ways.begin(), ways.end());
    }
    return all;
  }
  std::int64_t count() const { return static_cast<std::int64_t>(columns.size()); }
  std::size_t outputs() const {
    const conv::Shape& s = problem.shape;
    return static_cast<std::size_t>(problem.images * s.filters * s.out_height() * s.out_width());
  }

  // The results, on scratch full of NaN; the halo must stay as it is.
  std::vector<float> run_packed(const Plan& way, const AlignedBytes& packed, int threads,
                                const Quantization* rounding = nullptr) {
    const conv::Shape& s = problem.shape;
    Tensor out(problem.images, s.filters, s.out_height(), s.out_width(), out_padding);
    const std::vector<float> before = out.memory;
    const auto floats = static_cast<std::size_t>(scratch_size(way));
    AlignedBytes scratch(floats * sizeof(float));
    std::fill_n(static_cast<float*>(scratch.data()), floats, kNaN);
    run(way, const_cast<AlignedBytes&>(packed).data(), problem.images, in.data(), out.data(), out.layout.pitch,
        epilogue, rounding, static_cast<float*>(scratch.data()), threads);
    std::vector<float> got = out.interior();
    out.each([](float& value) { value = kNaN; });
    const bool untouched = std::memcmp(out.memory.data(), before.data(), before.size() * sizeof(float)) == 0;
    EXPECT_EQ(untouched ? "" : "halo written by " + describe(problem, way), "");
    return got;
  }

  Problem problem;
  Tensor in, residual;
  std::vector<std::int64_t> columns;
  std::vector<float> bias, weights;
  conv::Padding out_padding;
  conv::Epilogue epilogue;
};

void check_bfloat16(Random& random, const Problem& problem) {
  Case c(random, problem);
  const conv::Shape& s = problem.shape;
  Tensor in = c.in;  // rounded, in a copy: products of rounded numbers are exact in double
  in.each([](float& value) { value = reference::rounded_to_bfloat16(value); });
  std::vector<float> weights = c.weights;
  for (float& w : weights) w = reference::rounded_to_bfloat16(w);
  std::vector<double> expected(c.outputs()), sums(c.outputs());
  conv::reference::run(s, in.layout.pitch, c.count(), c.columns.data(), weights.data(), c.bias.data(), problem.images,
                       in.data(), c.epilogue, expected.data(), sums.data());
  for (const Plan& way : c.planned(Number::bfloat16)) {
    AlignedBytes packed(packed_size(way));
    pack(way, c.count(), c.columns.data(), c.weights.data(), c.bias.data(), packed.data());
    const std::vector<float> got = c.run_packed(way, packed, static_cast<int>(between(random, 1, 3)));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      // Some units round every product, and not to the nearest.
      const double roundings = 2 * static_cast<double>(c.count() + 3);
      const double bound = 1.2e-7 * (roundings * sums[i] + 8 * (1 + std::abs(expected[i])));
      if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= bound)) ++wrong;
    }
    EXPECT_EQ(std::to_string(wrong) + " wrong of " + describe(problem, way), "0 wrong of " + describe(problem, way));
  }
}

// Of smooth activations the last bits may differ.
std::size_t count_wrong(const std::vector<float>& got, const std::vector<float>& expected, bool exact) {
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const bool same =
        exact ? got[i] == expected[i] : std::abs(got[i] - expected[i]) <= 1e-6f * (1 + std::abs(expected[i]));
    if (!same) ++wrong;
  }
  return wrong;
}

// An image of bytes full of anything.
struct ByteTensor {
  ByteTensor(Random& random, std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
             const conv::Padding& padding)
      : layout(byte_layout(images, channels, height, width, padding)), memory(static_cast<std::size_t>(layout.size)) {
    for (unsigned char& byte : memory) byte = static_cast<unsigned char>(between(random, 0, 255));
  }
  unsigned char* data() { return memory.data() + layout.before; }
  unsigned char& at(std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t x) {
    return data()[n * layout.pitch.image + y * layout.pitch.row + x * layout.pitch.pixel + c];
  }

  ByteLayout layout;
  std::vector<unsigned char> memory;
};

// On every unit that computes on bytes: to planes and, without a residual of float32, to bytes. expected: of the
// reference.
void check_bytes(Random& random, Case& c, const std::vector<float>& scales, const Quantization& input,
                 const Quantization* rounding, const std::vector<float>& expected, bool exact) {
  const conv::Shape& s = c.problem.shape;
  if (s.groups > 1 && !is_depthwise(s, c.count())) return;
  for (const Unit unit : units(active_isa(), Number::int8)) {
    if (!has_bytes(unit)) continue;
    ByteTensor in(random, c.problem.images, s.channels, s.height, s.width, s.padding);
    fill_halo(in.data(), in.layout, c.problem.images, s.height, s.width, input);
    make_bytes(unit, c.in.layout.pitch, c.in.data(), input, c.problem.images, s.channels, s.height, s.width,
               in.layout.pitch, in.data(), static_cast<int>(between(random, 1, 3)));
    const BytePlan plan = byte_plan(s, in.layout, c.count(), c.columns.data(), unit);
    AlignedBytes packed(packed_size(plan));
    pack(plan, c.count(), c.columns.data(), c.weights.data(), scales.data(), input, c.bias.data(), packed.data());
    AlignedBytes scratch(static_cast<std::size_t>(scratch_size(plan)) * sizeof(float));
    const std::string what = "bytes on " + describe(c.problem, {s, c.in.layout.pitch, Number::int8, unit});

    ByteTensor added(random, c.problem.images, s.filters, s.out_height(), s.out_width(), c.out_padding);
    ByteResidual bytes;
    conv::Epilogue epilogue = c.epilogue;
    if (rounding != nullptr) {
      make_bytes(unit, c.residual.layout.pitch, c.residual.data(), *rounding, c.problem.images, s.filters,
                 s.out_height(), s.out_width(), added.layout.pitch, added.data(), 1);
      bytes = {added.data(), added.layout.pitch, *rounding};
      epilogue.residual = nullptr;
    }
    const ByteResidual* residual = rounding == nullptr ? nullptr : &bytes;

    Tensor planes(c.problem.images, s.filters, s.out_height(), s.out_width(), c.out_padding);
    const std::vector<float> before = planes.memory;
    ByteTarget target;
    target.planes = planes.data();
    target.pitch = planes.layout.pitch;
    run(plan, packed.data(), c.problem.images, in.data(), residual, target, epilogue,
        static_cast<float*>(scratch.data()), static_cast<int>(between(random, 1, 3)));
    const std::vector<float> got = planes.interior();
    std::size_t wrong = count_wrong(got, expected, exact);
    EXPECT_EQ(std::to_string(wrong) + " wrong of " + what, "0 wrong of " + what);
    planes.each([](float& value) { value = kNaN; });
    EXPECT_EQ(std::memcmp(planes.memory.data(), before.data(), before.size() * sizeof(float)), 0);

    if (epilogue.residual != nullptr) continue;
    ByteTensor out(random, c.problem.images, s.filters, s.out_height(), s.out_width(), c.out_padding);
    std::vector<unsigned char> kept = out.memory;
    target = {};
    target.bytes = out.data();
    target.byte_pitch = out.layout.pitch;
    target.numbers = {0.5f, static_cast<std::int32_t>(between(random, 0, 255))};
    run(plan, packed.data(), c.problem.images, in.data(), residual, target, epilogue,
        static_cast<float*>(scratch.data()), static_cast<int>(between(random, 1, 3)));
    wrong = 0;
    std::size_t i = 0;
    for (std::int64_t n = 0; n < c.problem.images; ++n) {
      for (std::int64_t f = 0; f < s.filters; ++f) {
        for (std::int64_t y = 0; y < s.out_height(); ++y) {
          for (std::int64_t x = 0; x < s.out_width(); ++x, ++i) {
            // Of smooth activations the results of planes, which differ from the reference in their last bits.
            if (out.at(n, f, y, x) != reference::quantized(got[i], target.numbers)) ++wrong;
          }
        }
      }
    }
    EXPECT_EQ(std::to_string(wrong) + " wrong bytes of " + what, "0 wrong bytes of " + what);
    for (std::int64_t n = 0; n < c.problem.images; ++n) {
      for (std::int64_t y = 0; y < s.out_height(); ++y) {
        unsigned char* row = out.data() + n * out.layout.pitch.image + y * out.layout.pitch.row;
        std::copy_n(row, s.out_width() * out.layout.pitch.pixel, kept.data() + (row - out.memory.data()));
      }
    }
    EXPECT_EQ(kept == out.memory ? "" : "halo written by " + what, "");
  }
}

// Between planes, on every unit.
void check_depthwise(Random& random, Case& c, const std::vector<float>& scales, const Quantization& input,
                     const Quantization* rounding, const std::vector<float>& expected, bool exact) {
  const conv::Shape& s = c.problem.shape;
  for (const Unit unit : units(active_isa(), Number::int8)) {
    const DepthwisePlan plan = depthwise_plan(s, c.in.layout.pitch, active_isa(), unit);
    AlignedBytes packed(packed_size(plan));
    pack(plan, c.weights.data(), scales.data(), input, c.bias.data(), packed.data());
    const auto floats = static_cast<std::size_t>(scratch_size(plan));
    AlignedBytes scratch(floats * sizeof(float));
    std::fill_n(static_cast<float*>(scratch.data()), floats, kNaN);
    Tensor out(c.problem.images, s.filters, s.out_height(), s.out_width(), c.out_padding);
    const std::vector<float> before = out.memory;
    run(plan, packed.data(), c.problem.images, c.in.data(), out.data(), out.layout.pitch, c.epilogue, rounding,
        static_cast<float*>(scratch.data()), static_cast<int>(between(random, 1, 3)));
    const std::vector<float> got = out.interior();
    const std::size_t wrong = count_wrong(got, expected, exact);
    const std::string what = "depthwise " + describe(c.problem, {s, c.in.layout.pitch, Number::int8, unit});
    EXPECT_EQ(std::to_string(wrong) + " wrong of " + what, "0 wrong of " + what);
    out.each([](float& value) { value = kNaN; });
    EXPECT_EQ(std::memcmp(out.memory.data(), before.data(), before.size() * sizeof(float)), 0);
  }
}

Quantization random_numbers(Random& random) {
  return {0.02f + 0.01f * static_cast<float>(between(random, 0, 3)),
          static_cast<std::int32_t>(between(random, 0, 3) == 0 ? 0 : between(random, 0, 255))};
}

// With some values that are cut, and what no network should hold.
void spoil(Random& random, Tensor& tensor, const Quantization& numbers) {
  tensor.each([&](float& value) {
    const std::int64_t draw = between(random, 0, 60);
    if (draw == 0) value = 1e30f;
    if (draw == 1) value = -1e30f;
    if (draw == 2) value = kNaN;
    if (draw == 3) value = numbers.scale * 2.5f;  // a tie, nearly
    if (draw == 4) value = kInfinity;
    if (draw == 5) value = -kInfinity;
    if (draw == 6) value = -0.0f;
  });
}

void check_int8(Random& random, const Problem& problem) {
  Case c(random, problem);
  const conv::Shape& s = problem.shape;
  const Quantization input = random_numbers(random), residual = random_numbers(random);
  const bool rounds = problem.residual && between(random, 0, 2) > 0;
  const Quantization* rounding = rounds ? &residual : nullptr;
  for (float& w : c.weights) w = static_cast<float>(between(random, -127, 127));
  std::vector<float> scales = gaussian(random, s.filters);
  for (float& scale : scales) scale = 0.001f + 0.01f * std::abs(scale);
  spoil(random, c.in, input);
  if (rounds) spoil(random, c.residual, residual);
  std::vector<float> expected(c.outputs());
  reference::run(s, c.in.layout.pitch, c.count(), c.columns.data(), c.weights.data(), scales.data(), input,
                 c.bias.data(), problem.images, c.in.data(), c.epilogue, rounding, expected.data());
  const bool exact = problem.epilogue.activation == Activation::none ||
                     problem.epilogue.activation == Activation::relu ||
                     problem.epilogue.activation == Activation::relu6;
  check_bytes(random, c, scales, input, rounding, expected, exact);
  if (is_depthwise(s, c.count())) check_depthwise(random, c, scales, input, rounding, expected, exact);
  for (const Plan& way : c.planned(Number::int8)) {
    AlignedBytes packed(packed_size(way));
    pack(way, c.count(), c.columns.data(), c.weights.data(), scales.data(), input, c.bias.data(), packed.data());
    const std::vector<float> got = c.run_packed(way, packed, static_cast<int>(between(random, 1, 3)), rounding);
    const std::size_t wrong = count_wrong(got, expected, exact);
    const std::string what = describe(problem, way) + " rounded " + std::to_string(rounds);
    EXPECT_EQ(std::to_string(wrong) + " wrong of " + what, "0 wrong of " + what);
  }
}

void check(Random& random, const Problem& problem) {
  check_bfloat16(random, problem);
  check_int8(random, problem);
}

ACF_TEST(random_problems_equal_the_reference) {
  Random random(1);
  for (int i = 0; i < 250; ++i) {
    Problem problem;
    problem.shape = conv::random_shape(random, 40);
    problem.images = between(random, 0, 1) == 0 ? 1 : 3;
    problem.share = std::vector<double>{1.0, 1.0, 0.5, 0.1, 0.0}[static_cast<std::size_t>(i % 5)];
    problem.epilogue.activation = conv::kActivations[i % 9];
    problem.epilogue.slope = 0.2f;
    problem.residual = i % 2 == 0;
    check(random, problem);
  }
}

// Tiles of pixels in one stretch, in several, and across images; with a step of 2 as well.
ACF_TEST(every_size_of_plane_equals_the_reference) {
  Random random(2);
  for (std::int64_t width = 1; width <= 40; ++width) {
    for (const std::int64_t stride : {1, 2}) {
      Problem problem;
      problem.shape.channels = 11;
      problem.shape.height = width <= 8 ? width : 1 + width % 5;
      problem.shape.width = width;
      problem.shape.filters = 1 + width * 7 % 40;
      problem.shape.kernel_h = problem.shape.kernel_w = 3;
      problem.shape.stride_h = problem.shape.stride_w = stride;
      problem.shape.padding = {1, 1, 1, 1};
      problem.images = 1 + width % 3;
      check(random, problem);
    }
  }
}

// Most of them 3x3 without strides, which are computed on rows of bytes; activations that clamp, and others.
ACF_TEST(depthwise_layers_equal_the_reference) {
  Random random(7);
  for (const std::int64_t channels : {2, 3, 4, 15, 16, 17, 60, 64, 65, 130, 200, 260}) {
    for (int i = 0; i < 12; ++i) {
      Problem problem;
      conv::Shape& s = problem.shape;
      s.channels = s.filters = s.groups = channels;
      s.height = between(random, 5, 10);
      s.width = between(random, 5, 27);
      s.kernel_h = s.kernel_w = 3;
      if (i % 3 == 2) {
        s.kernel_h = between(random, 1, 5);
        s.kernel_w = between(random, 1, 5);
        s.stride_h = s.stride_w = between(random, 1, 3);
        s.dilation_h = s.dilation_w = s.kernel_h < 4 && s.kernel_w < 4 ? between(random, 1, 2) : 1;
      }
      s.padding = {between(random, 0, 2), between(random, 0, 2), between(random, 0, 2), between(random, 0, 2)};
      problem.images = between(random, 1, 3);
      constexpr Activation kClamping[] = {Activation::none, Activation::relu, Activation::relu6};
      problem.epilogue.activation = i % 4 == 3 ? conv::kActivations[between(random, 0, 8)] : kClamping[i % 4];
      problem.residual = i % 6 == 5;
      check(random, problem);
    }
  }
}

ACF_TEST(linear_layers_equal_the_reference) {
  Random random(3);
  for (const std::int64_t images : {1, 2, 15, 16, 17, 33}) {
    for (const std::int64_t features : {1, 10, 16, 131, 150}) {
      Problem problem;
      problem.shape.channels = 77;
      problem.shape.filters = features;
      problem.images = images;
      problem.share = features % 2 == 0 ? 1.0 : 0.3;
      problem.residual = images % 3 == 0;
      check(random, problem);
    }
  }
}

// A stride that no second pixel takes, and planes whose rows lie far apart.
ACF_TEST(strides_and_rows_of_any_size_equal_the_reference) {
  Random random(6);
  Problem problem;
  problem.shape.channels = 5;
  problem.shape.filters = 19;
  problem.shape.stride_h = problem.shape.stride_w = std::int64_t{1} << 28;
  problem.images = 33;
  check(random, problem);
  problem.shape.width = problem.shape.kernel_w = 5'000;
  problem.shape.height = 3;
  problem.shape.stride_h = 1;
  problem.images = 2;
  check(random, problem);
}

// More weights than are kept in the cache, so that many tiles of pixels are gathered at once; and any threads.
ACF_TEST(large_layers_equal_the_reference_for_any_threads) {
  Random random(4);
  Problem problem;
  conv::Shape& s = problem.shape;
  s.channels = 256;
  s.filters = 263;
  s.height = s.width = 8;
  s.kernel_h = s.kernel_w = 3;
  s.padding = {1, 1, 1, 1};
  problem.images = 2;
  problem.share = 0.9;
  check(random, problem);

  Case c(random, problem);
  for (const Plan& way : c.planned(Number::bfloat16)) {
    AlignedBytes packed(packed_size(way));
    pack(way, c.count(), c.columns.data(), c.weights.data(), c.bias.data(), packed.data());
    const std::vector<float> one = c.run_packed(way, packed, 1);
    for (const int threads : {2, 3, 5}) EXPECT(c.run_packed(way, packed, threads) == one);
  }
}

// Largest products of both signs: no unit saturates between.
ACF_TEST(sums_of_extremes_are_exact) {
  Problem problem;
  problem.shape.channels = 2001;
  problem.shape.filters = 3;
  Random random(5);
  Case c(random, problem);
  for (const float sign : {1.0f, -1.0f}) {
    c.in.each([](float& value) { value = 1e9f; });
    std::fill(c.weights.begin(), c.weights.end(), 127 * sign);
    const std::vector<float> scales(3, 1.0f);
    const Quantization input = {1, 0};
    for (const Plan& way : c.planned(Number::int8)) {
      AlignedBytes packed(packed_size(way));
      pack(way, c.count(), c.columns.data(), c.weights.data(), scales.data(), input, nullptr, packed.data());
      for (const float y : c.run_packed(way, packed, 1)) EXPECT_EQ(y, sign * 2001 * 255 * 127);
    }
  }
}

ACF_TEST(roundings_are_those_of_the_definition) {
  EXPECT_EQ(reference::rounded_to_bfloat16(1.00390625f), 1.0f);       // a tie, to even
  EXPECT_EQ(reference::rounded_to_bfloat16(1.01171875f), 1.015625f);  // a tie, to even
  EXPECT_EQ(reference::quantized(0.5f, {1, 10}), 10);
  EXPECT_EQ(reference::quantized(1.5f, {1, 10}), 12);
  EXPECT_EQ(reference::quantized(-11.0f, {1, 10}), 0);
  EXPECT_EQ(reference::quantized(1e38f, {0.001f, 10}), 255);
  EXPECT_EQ(reference::quantized(kNaN, {1, 10}), 255);
}

ACF_TEST(what_cannot_be_computed_is_refused) {
  conv::Shape shape;
  shape.channels = 100'000;
  std::vector<std::int64_t> columns(100'000);
  for (std::size_t i = 0; i < columns.size(); ++i) columns[i] = static_cast<std::int64_t>(i);
  const conv::Pitch pitch = {1, 1, 100'000};
  EXPECT_THROWS(plan(shape, pitch, 1, 100'000, columns.data(), Number::int8, Unit::generic), std::invalid_argument,
                "got 100000");
  EXPECT_THROWS(plan(shape, pitch, 1, 100'000, columns.data(), Number::bfloat16, Unit::generic), std::invalid_argument,
                "'generic' does not multiply");
  const Plan way = plan(shape, pitch, 1, 10, columns.data(), Number::int8, Unit::generic);
  const std::vector<float> weights(10);
  AlignedBytes packed(packed_size(way));
  for (const float scale : {0.0f, -1.0f, kNaN}) {
    EXPECT_THROWS(pack(way, 10, columns.data(), weights.data(), weights.data(), {scale, 0}, nullptr, packed.data()),
                  std::invalid_argument, "the scale of the input must be positive");
  }
  EXPECT_THROWS(pack(way, 10, columns.data(), weights.data(), weights.data(), {1, 256}, nullptr, packed.data()),
                std::invalid_argument, "from 0 to 255, got 256");
  EXPECT_THROWS(run(way, packed.data(), 1, weights.data(), nullptr, {}, {}, nullptr, nullptr, 1), std::invalid_argument,
                "must come from pack()");
  pack(way, 10, columns.data(), weights.data(), weights.data(), {1, 0}, nullptr, packed.data());
  const Quantization wrong[] = {{0.0f, 0}, {kNaN, 0}, {1, 256}, {1, -1}};
  for (const Quantization& numbers : wrong) {
    EXPECT_THROWS(run(way, packed.data(), 1, weights.data(), nullptr, {}, {}, &numbers, nullptr, 1),
                  std::invalid_argument, "of the residual must be");
  }
}

}  // namespace
}  // namespace acf::narrow
