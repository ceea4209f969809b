// The kernels of every ISA against reference.cpp, on memory that ends exactly where the data ends.
#include "projection/projection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/isa.h"
#include "projection/kernels.h"
#include "tests/testing.h"

namespace acf::projection {
namespace {

constexpr Structure kStructures[] = {Structure::filter, Structure::channel, Structure::column, Structure::element};

const Shape kShapes[] = {
    // rows, columns, groups, taps
    {1, 1, 1, 1},   {1, 15, 1, 1}, {2, 16, 1, 4},  {3, 17, 1, 1},   {5, 33, 1, 11},
    {12, 27, 4, 9}, {8, 9, 8, 9},  {31, 64, 1, 1}, {9, 2063, 3, 1}, {40, 1030, 1, 1},
};

// Whole numbers: squares add up exactly in any order, and there are ties.
template <class T>
std::vector<T> whole_numbers(std::mt19937& random, std::int64_t n) {
  std::uniform_int_distribution<int> numbers(-20, 20);
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& value : values) value = static_cast<T>(numbers(random));
  values.shrink_to_fit();
  return values;
}

template <class T>
std::vector<T> gaussian(std::mt19937& random, std::int64_t n) {
  std::normal_distribution<double> numbers;
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& value : values) value = static_cast<T>(numbers(random));
  values.shrink_to_fit();
  return values;
}

// Equal bit by bit.
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Equal, with -0 equal to 0: the reference keeps the sign of a zero in V - Z.
template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return a == b;
}

Options options_for(Isa isa, int threads = 1) {
  Options options;
  options.isa = isa;
  options.threads = threads;
  return options;
}

template <class T>
Layer<T> layer_of(const std::vector<T>& w, std::vector<T>& z, std::vector<T>& u, const Shape& shape,
                  Structure structure, std::int64_t keep) {
  Layer<T> layer;
  layer.w = w.data();
  layer.z = z.data();
  layer.u = u.data();
  layer.shape = shape;
  layer.structure = structure;
  layer.keep = keep;
  return layer;
}

template <class T>
void compare_with_reference() {
  std::mt19937 random(1);
  for (const Shape& shape : kShapes) {
    for (const Structure structure : kStructures) {
      const std::int64_t groups = group_count(shape, structure);
      const std::vector<T> w = whole_numbers<T>(random, shape.size()), u = whole_numbers<T>(random, shape.size()),
                           z = whole_numbers<T>(random, shape.size());
      std::vector<double> squares(static_cast<std::size_t>(groups)), norms(squares.size());
      reference::group_squares<T>(w.data(), nullptr, shape, structure, squares.data());
      for (const std::int64_t keep : {std::int64_t{0}, (groups + 2) / 3, groups - 1, groups}) {
        std::vector<T> expected(w.size()), expected_z = z, expected_u = u;
        reference::project(w.data(), expected.data(), shape, structure, keep);
        Layer<T> by_the_book = layer_of(w, expected_z, expected_u, shape, structure, keep);
        reference::admm_update(by_the_book);
        for (const Isa isa : supported_isas()) {
          for (const int threads : {1, 3}) {
            const Options options = options_for(isa, threads);
            group_norms(w.data(), shape, structure, options, norms.data());
            for (std::size_t i = 0; i < norms.size(); ++i) EXPECT_EQ(norms[i], std::sqrt(squares[i]));
            std::vector<T> out(w.size(), T{7}), new_z = z, new_u = u;
            project(w.data(), out.data(), shape, structure, keep, 0, options);
            EXPECT(equal(out, expected));
            Layer<T> layer = layer_of(w, new_z, new_u, shape, structure, keep);
            admm_update(&layer, 1, options);
            EXPECT(equal(new_z, expected_z));
            EXPECT(equal(new_u, expected_u));
            EXPECT(std::abs(layer.primal - by_the_book.primal) <= 1e-5 * by_the_book.primal);
            EXPECT(std::abs(layer.dual - by_the_book.dual) <= 1e-5 * by_the_book.dual);
          }
        }
      }
    }
  }
}

ACF_TEST(projection_and_update_equal_the_reference_float) { compare_with_reference<float>(); }
ACF_TEST(projection_and_update_equal_the_reference_double) { compare_with_reference<double>(); }

// Rounded sums: every bit must agree between ISAs and thread counts, residuals included.
template <class T>
void compare_isas() {
  std::mt19937 random(2);
  // The last is large enough for several threads to be used.
  for (const Shape& shape : {Shape{64, 549, 1, 9}, Shape{32, 45, 4, 9}, Shape{3, 20011, 1, 1}, Shape{66, 4100, 2, 4}}) {
    for (const Structure structure :
         {Structure::filter, Structure::channel, Structure::column, Structure::element, Structure::filter_and_column}) {
      const bool joint = structure == Structure::filter_and_column;
      const std::int64_t keep = joint ? shape.rows / 3 : group_count(shape, structure) / 3;
      const std::vector<T> w = gaussian<T>(random, shape.size()), u = gaussian<T>(random, shape.size()),
                           z = gaussian<T>(random, shape.size());
      std::vector<T> first_z, first_u;
      double first_primal = 0, first_dual = 0;
      for (const Isa isa : supported_isas()) {
        for (const int threads : {1, 4}) {
          std::vector<T> new_z = z, new_u = u;
          Layer<T> layer = layer_of(w, new_z, new_u, shape, structure, keep);
          layer.keep_columns = shape.groups * shape.columns / 4;
          admm_update(&layer, 1, options_for(isa, threads));
          if (first_z.empty()) {
            first_z = new_z;
            first_u = new_u;
            first_primal = layer.primal;
            first_dual = layer.dual;
          }
          EXPECT(same(new_z, first_z));
          EXPECT(same(new_u, first_u));
          EXPECT_EQ(layer.primal, first_primal);
          EXPECT_EQ(layer.dual, first_dual);
        }
      }
    }
  }
}

ACF_TEST(isas_and_threads_agree_to_the_bit_float) { compare_isas<float>(); }
ACF_TEST(isas_and_threads_agree_to_the_bit_double) { compare_isas<double>(); }

// Orders and ties that mislead a sample, over several tasks.
template <class T>
void select_elements() {
  std::mt19937 random(3);
  constexpr std::int64_t kSize = 40000;
  std::vector<std::vector<T>> inputs(6, gaussian<T>(random, kSize));
  std::sort(inputs[1].begin(), inputs[1].end());
  for (T& value : inputs[2]) value = std::round(value);
  for (T& value : inputs[3]) value = T{-0.5};
  for (T& value : inputs[4]) value = value > 1 ? value : T{0};
  for (std::size_t i = 0; i < inputs[5].size(); ++i) inputs[5][i] = i / 5000 == 2 ? 1 + inputs[5][i] / 1000 : T(i % 7);
  const Shape shape{1, kSize, 1, 1};
  for (const std::vector<T>& w : inputs) {
    for (const std::int64_t keep : {std::int64_t{1}, kSize / 50, kSize / 2, kSize - 1}) {
      std::vector<T> expected(w.size());
      reference::project(w.data(), expected.data(), shape, Structure::element, keep);
      for (const Isa isa : supported_isas()) {
        std::vector<T> out(w.size());
        project(w.data(), out.data(), shape, Structure::element, keep, 0, options_for(isa, 2));
        EXPECT(equal(out, expected));
      }
    }
  }
}

ACF_TEST(elements_of_peculiar_data_float) { select_elements<float>(); }
ACF_TEST(elements_of_peculiar_data_double) { select_elements<double>(); }

ACF_TEST(select_finds_every_rank) {
  std::mt19937 random(4);
  for (const Isa isa : supported_isas()) {
    for (const std::int64_t n : {1, 2, 15, 16, 17, 100, 1000}) {
      for (const int limit : {1, 3, 1 << 30}) {
        std::uniform_int_distribution<std::int32_t> numbers(0, limit);
        std::vector<std::int32_t> values(static_cast<std::size_t>(n));
        for (std::int32_t& value : values) value = numbers(random);
        std::vector<std::int32_t> sorted = values;
        std::sort(sorted.rbegin(), sorted.rend());
        for (const std::int64_t rank : {std::int64_t{1}, (n + 1) / 2, n}) {
          std::vector<std::int32_t> keys = values;
          keys.resize(keys.size() + kBlock);
          const Selected<float> found = kernels<float>(isa).select(keys.data(), n, rank);
          const std::int32_t key = sorted[static_cast<std::size_t>(rank - 1)];
          EXPECT_EQ(found.key, key);
          EXPECT_EQ(found.ties, std::count(sorted.begin(), sorted.end(), key));
          EXPECT_EQ(found.rank, rank - (std::find(sorted.begin(), sorted.end(), key) - sorted.begin()));
        }
      }
    }
  }
}

ACF_TEST(not_finite_is_found_and_nothing_is_written) {
  const Shape shape{4, 25, 1, 1};
  for (const Isa isa : supported_isas()) {
    for (const Structure structure :
         {Structure::filter, Structure::column, Structure::element, Structure::filter_and_column}) {
      for (const std::size_t place : {std::size_t{0}, std::size_t{24}, std::size_t{99}}) {
        std::vector<float> w(100, 1), z(100, 2), u(100, 3);
        u[place] = std::numeric_limits<float>::quiet_NaN();
        Layer<float> layer = layer_of(w, z, u, shape, structure, 2);
        layer.keep_columns = 2;
        try {
          admm_update(&layer, 1, options_for(isa));
          EXPECT(false);
        } catch (const NotFinite& error) {
          EXPECT(error.array == NotFinite::Array::dual);
          EXPECT_EQ(error.count, 1);
          EXPECT_EQ(error.first, static_cast<std::int64_t>(place));
        }
        EXPECT(std::all_of(z.begin(), z.end(), [](float value) { return value == 2; }));
      }
    }
  }
}

ACF_TEST(first_bad_layer_is_named_whatever_the_threads) {
  const Shape shape{64, 2048, 1, 1};  // five of them are worth several threads
  const auto size = static_cast<std::size_t>(shape.size());
  for (const int threads : {1, 4}) {
    std::vector<std::vector<float>> w(5, std::vector<float>(size, 1)), z = w, u = w;
    w[2][5] = w[4][1] = std::numeric_limits<float>::infinity();
    std::vector<Layer<float>> layers;
    for (std::size_t i = 0; i < w.size(); ++i)
      layers.push_back(layer_of(w[i], z[i], u[i], shape, Structure::filter, 1));
    try {
      admm_update(layers.data(), 5, options_for(active_isa(), threads));
      EXPECT(false);
    } catch (const NotFinite& error) {
      EXPECT_EQ(error.layer, 2);
      EXPECT_EQ(error.first, 5);
    }
    EXPECT(z[0] == std::vector<float>(size, 1));
  }
}

ACF_TEST(joint_projection_is_never_worse_than_sequential) {
  std::mt19937 random(5);
  const Shape shape{10, 24, 2, 4};
  for (int round = 0; round < 50; ++round) {
    const std::vector<double> w = gaussian<double>(random, shape.size());
    std::vector<double> filters(w.size()), sequential(w.size()), joint(w.size());
    reference::project(w.data(), filters.data(), shape, Structure::filter, 4);
    reference::project(filters.data(), sequential.data(), shape, Structure::column, 15);
    const auto energy = [](const std::vector<double>& values) {
      double sum = 0;
      for (double value : values) sum += value * value;
      return sum;
    };
    for (const Isa isa : supported_isas()) {
      project(w.data(), joint.data(), shape, Structure::filter_and_column, 4, 15, options_for(isa));
      EXPECT(energy(joint) >= energy(sequential) * (1 - 1e-12));
    }
  }
}

ACF_TEST(levels_are_the_nearest) {
  const std::vector<double> levels = {-2, -0.5, 0, 1, 4};
  const std::vector<float> w = {-9, -1.25f, -1, -0.25f, 0, 0.5f, 0.75f, 2.5f, 2.75f};
  const std::vector<std::int8_t> expected = {0, 0, 1, 1, 2, 2, 3, 3, 4};
  std::vector<float> values(w.size());
  std::vector<std::int8_t> codes(w.size());
  project_levels(w.data(), 9, levels.data(), 5, 1.0, options_for(active_isa(), 2), values.data(), codes.data());
  EXPECT(codes == expected);
  for (std::size_t i = 0; i < w.size(); ++i) EXPECT_EQ(values[i], levels[static_cast<std::size_t>(codes[i])]);
  const double binary[] = {-1, 1};
  bool exact = false;
  const float sizes[] = {1, -2, 3, -6};
  EXPECT_EQ(best_scale(sizes, 4, binary, 2, &exact), 3.0);
  EXPECT(exact);
}

}  // namespace
}  // namespace acf::projection
