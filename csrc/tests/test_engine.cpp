#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "core/isa.h"
#include "engine/arena.h"
#include "engine/network.h"
#include "tests/testing.h"

namespace acf::engine {
namespace {

using Values = std::vector<float>;

Values numbers(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Values values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

Weights dense(std::int64_t filters, std::int64_t columns, unsigned seed) {
  Weights weights;
  weights.filters = filters;
  for (std::int64_t c = 0; c < columns; ++c) weights.columns.push_back(c);
  weights.values = numbers(static_cast<std::size_t>(filters * columns), seed);
  weights.bias = numbers(static_cast<std::size_t>(filters), seed + 1);
  return weights;
}

SparseWeights sparse(const Weights& weights) {
  SparseWeights result;
  result.filters = weights.filters;
  result.bias = weights.bias;
  result.offsets.push_back(0);
  for (std::size_t i = 0; i < weights.values.size(); ++i) {
    if (weights.values[i] != 0) {
      result.values.push_back(weights.values[i]);
      result.indices.push_back(weights.columns[i % weights.columns.size()]);
    }
    if ((i + 1) % weights.columns.size() == 0)
      result.offsets.push_back(static_cast<std::int64_t>(result.values.size()));
  }
  return result;
}

Window window(std::int64_t kernel, std::int64_t stride, std::int64_t padding) {
  return {kernel, kernel, stride, stride, 1, 1, {padding, padding, padding, padding}};
}

Values run(Network& network, std::int64_t images, const Values& input, int threads = 1, std::int64_t part = 100) {
  const float* in = input.data();
  Values output(static_cast<std::size_t>(images * elements(network.shape(network.outputs()[0]))));
  float* out = output.data();
  network.run(images, part, &in, &out, threads);
  return output;
}

bool close(const Values& a, const Values& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= 1e-4f * (1 + std::fabs(b[i])))) return false;
  }
  return true;
}

ACF_TEST(blocks_lie_apart_while_both_are_needed) {
  std::vector<Block> blocks = {{16, 0, 1}, {32, 1, 2}, {16, 2, 3}, {64, 3, 4}, {16, 0, 4}};
  const std::int64_t size = place(blocks);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    EXPECT(blocks[i].offset + blocks[i].size <= size);
    for (std::size_t j = 0; j < i; ++j) {
      const bool together = blocks[i].first <= blocks[j].last && blocks[j].first <= blocks[i].last;
      const bool apart = blocks[i].offset + blocks[i].size <= blocks[j].offset ||
                         blocks[j].offset + blocks[j].size <= blocks[i].offset;
      EXPECT(apart || !together);
    }
  }
  EXPECT_EQ(size, 96);  // the last two and what is needed beside them
}

ACF_TEST(halos_are_dirty_when_others_have_written_there) {
  EXPECT(dirty_halos({{0, 10, 0}, {20, 30, 1}}) == (std::vector<bool>{false, false}));
  EXPECT(dirty_halos({{0, 10, 0}, {0, 10, 0}}) == (std::vector<bool>{false, false}));  // the same zeros
  EXPECT(dirty_halos({{0, 10, 0}, {0, 10, 1}}) == (std::vector<bool>{true, true}));    // of the run before
  EXPECT(dirty_halos({{0, 10, 0}, {9, 12, -1}}) == (std::vector<bool>{true, false}));
  EXPECT(dirty_halos({{0, 10, -1}, {5, 15, -1}, {0, 5, 0}}) == (std::vector<bool>{false, false, true}));  // a rest
}

// Values of all kinds of lives, so that each lies where others lay before: x -> a -> b, then a + b -> pool -> c ->
// flat.
ACF_TEST(a_network_gives_the_same_again_and_for_every_isa) {
  const Values first = numbers(2 * 3 * 9 * 13, 1), second = numbers(5 * 3 * 9 * 13, 2);
  Values expected_first, expected_second;
  for (const Isa isa : supported_isas()) {
    Network network(isa);
    const int x = network.add_input({3, 9, 13});
    const int a = network.add(convolution(window(3, 1, 1), 1, dense(7, 27, 3), {conv::Activation::relu}), {x});
    const int b = network.add(convolution(window(5, 1, 2), 1, dense(7, 175, 5), {conv::Activation::silu}), {a, a});
    const int sum = network.add(combine(conv::Combine::multiply, {}, {}, {}), {a, b});
    Pooling pooling;
    pooling.window = window(3, 2, 1);
    const int pooled = network.add(pool(pooling), {sum});
    const int c = network.add(convolution(window(3, 1, 1), 1, dense(20, 63, 7), {}), {pooled});
    const int flat = network.add(reshape({20 * 5 * 7}), {c});
    network.finish({network.add(linear(dense(4, 20 * 5 * 7, 9), 20 * 5 * 7, {}), {flat})});
    const Values once = run(network, 2, first), other = run(network, 5, second), again = run(network, 2, first, 3);
    EXPECT(once == again);
    for (const std::int64_t part : {1, 2, 4}) {  // 2 leaves one for the last part
      const Values parts = run(network, 5, second, 1, part);
      EXPECT(close(parts, other));
      for (const int threads : {2, 3, 5, 9}) EXPECT(run(network, 5, second, threads, part) == parts);
    }
    for (std::size_t cut = 1; cut < network.steps(); ++cut) {
      const Network::Stage early = network.stage(0, cut), late = network.stage(cut, network.steps());
      EXPECT_EQ(early.network->steps() + late.network->steps(), network.steps());
      EXPECT(early.outputs == late.inputs);
      if (late.inputs.size() != 1) continue;
      EXPECT(run(*late.network, 2, run(*early.network, 2, first)) == once);
    }
    EXPECT_THROWS(network.stage(3, 3), std::invalid_argument, "a stage has steps of 0 to 7, got 3 to 3");
    if (expected_first.empty()) expected_first = once, expected_second = other;
    EXPECT(close(once, expected_first));
    EXPECT(close(other, expected_second));
    EXPECT(network.workspace_bytes(5) > network.workspace_bytes(2));
  }
}

// One plane with a halo above and below alone has no gaps, but does not begin where its memory does.
ACF_TEST(layers_are_computed_in_the_way_that_is_preferred) {
  for (const Isa isa : supported_isas()) {
    Network network(isa);
    int value = network.add_input({5, 12, 12});
    value = network.add(convolution(window(3, 1, 1), 1, dense(7, 45, 1), {conv::Activation::relu}), {value});
    value = network.add(pool({window(2, 2, 0)}), {value});
    network.finish({value});
    const Values x = numbers(3 * 5 * 144, 5), estimated = run(network, 3, x);
    for (const Way way : {Way::filters_in_lanes, Way::pixels_in_lanes, Way::winograd_tiles_in_lanes}) {
      network.prefer(0, 3, way);
      EXPECT(network.ways(3)[0] == way);
      EXPECT(!network.ways(3)[1]);
      EXPECT(close(run(network, 3, x), estimated));
      const Network::Stage stage = network.stage(0, 1);
      EXPECT(stage.network->ways(3)[0] == way);
    }
    const std::optional<Way> free = network.ways(2)[0];
    network.prefer(0, 3, Way::narrow);  // which float32 has not
    EXPECT(network.ways(3)[0] != Way::narrow);
    network.prefer(0, 0, Way::pixels_in_lanes);
    EXPECT(network.ways(2)[0] == Way::pixels_in_lanes);
    EXPECT(network.ways(3)[0] != Way::narrow);
    network.prefer(0, 0, {});
    EXPECT(network.ways(2)[0] == free);
    EXPECT_THROWS(network.prefer(2, 1, {}), std::invalid_argument, "steps are numbered from 0 to 2, got 2");
    EXPECT_THROWS(network.prefer(0, -1, {}), std::invalid_argument, "at least 0, got -1");
  }
}

ACF_TEST(what_is_reshaped_may_have_a_halo) {
  Network network(active_isa());
  const int x = network.add_input({1, 4, 14});
  Window tall = window(3, 1, 0);
  tall.kernel_w = 1;
  tall.padding = {1, 0, 1, 0};
  const int flat = network.add(reshape({56}), {x});
  const int c = network.add(convolution(tall, 1, dense(2, 3, 1), {}), {x});
  network.finish({flat, network.add(reshape({112}), {c})});
  const Values given = numbers(56, 3);
  const float* inputs[] = {given.data()};
  Values found(56), rest(112);
  float* outputs[] = {found.data(), rest.data()};
  network.run(1, 1, inputs, outputs, 1);
  EXPECT(found == given);
}

#if defined(__linux__)
ACF_TEST(a_network_prepared_by_a_pinned_thread_runs_on_all) {
  Network network(active_isa());
  const int x = network.add_input({16, 32, 32});
  const int a = network.add(convolution(window(3, 1, 1), 1, dense(16, 144, 1), {}), {x});
  network.finish({network.add(convolution(window(3, 1, 1), 1, dense(16, 144, 2), {}), {a})});
  const Values input = numbers(std::size_t{2} * 16 * 32 * 32, 3);
  Values alone;
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<unsigned>(sched_getcpu()), &one);
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
    alone = run(network, 2, input);
  }).join();
  for (const int threads : {2, 8, 100}) EXPECT(run(network, 2, input, threads) == alone);
}
#endif

ACF_TEST(sparse_layers_are_dense_ones_with_zeros) {
  for (const Isa isa : supported_isas()) {
    Weights weights = dense(6, 36, 11), last = dense(5, 6 * 8 * 6, 13);
    for (std::size_t i = 0; i < weights.values.size(); ++i) {
      if (i % 7 != 0) weights.values[i] = 0;
    }
    for (std::size_t i = 0; i < last.values.size(); ++i) {
      if (i % 11 != 0) last.values[i] = 0;
    }
    const Values input = numbers(3 * 4 * 8 * 6, 17);
    std::vector<Values> found;
    for (const bool thin : {false, true}) {
      Network network(isa);
      const Activated activated = {conv::Activation::hardswish};
      int value = network.add_input({4, 8, 6});
      value = network.add(thin ? sparse_convolution(window(3, 1, 1), 1, sparse(weights), activated)
                               : convolution(window(3, 1, 1), 1, weights, activated),
                          {value});
      value = network.add(reshape({6 * 8 * 6}), {value});
      value = network.add(thin ? sparse_linear(sparse(last), 6 * 8 * 6, activated) : linear(last, 6 * 8 * 6, activated),
                          {value});
      network.finish({value});
      found.push_back(run(network, 3, input));
    }
    EXPECT(close(found[1], found[0]));
  }
}

ACF_TEST(expansions_are_two_convolutions) {
  Weights expand = dense(45, 5, 21), depthwise = dense(45, 9, 23);
  expand.columns = {0, 2, 3, 4, 6};
  for (std::int64_t column = 9; column < 45 * 9; ++column) depthwise.columns.push_back(column);
  const Activated relu = {conv::Activation::relu6}, silu = {conv::Activation::silu};
  for (const Isa isa : supported_isas()) {
    for (const std::int64_t stride : {1, 2}) {
      for (const std::int64_t images : {1, 3}) {
        const Values input = numbers(static_cast<std::size_t>(images * 7 * 64 * 80), 25);  // three slices
        std::vector<Values> found;
        for (const bool together : {false, true}) {
          Network network(isa);
          int value = network.add_input({7, 64, 80});
          if (together) {
            value = network.add(expansion(expand, relu, window(3, stride, 1), depthwise, silu), {value});
          } else {
            value = network.add(convolution({}, 1, expand, relu), {value});
            value = network.add(convolution(window(3, stride, 1), 45, depthwise, silu), {value});
          }
          network.finish({network.add(activate(relu), {value})});
          found.push_back(run(network, images, input));
          for (const int threads : {1, 2, 5}) EXPECT(run(network, images, input, threads) == found.back());
        }
        EXPECT(close(found[1], found[0]));
      }
    }
  }
}

ACF_TEST(pools_are_those_of_their_definition) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Isa isa : supported_isas()) {
    for (const std::int64_t stride : {1, 2, 3}) {
      for (const bool largest : {true, false}) {
        Pooling pooling;
        pooling.window = window(3, stride, 1);
        pooling.largest = largest;
        pooling.count_padding = false;
        Network network(isa);
        const int x = network.add_input({2, 7, 40});
        network.finish({network.add(pool(pooling), {x})});
        Values input = numbers(2 * 7 * 40, 19);
        if (largest) input[45] = nan;
        const Values found = run(network, 1, input);
        const Shape made = network.shape(1);
        std::size_t at = 0;
        for (std::int64_t c = 0; c < 2; ++c) {
          for (std::int64_t y = 0; y < made[1]; ++y) {
            for (std::int64_t z = 0; z < made[2]; ++z, ++at) {
              float most = -std::numeric_limits<float>::infinity(), total = 0, count = 0;
              for (std::int64_t i = std::max<std::int64_t>(0, y * stride - 1);
                   i < std::min<std::int64_t>(7, y * stride + 2); ++i) {
                for (std::int64_t j = std::max<std::int64_t>(0, z * stride - 1);
                     j < std::min<std::int64_t>(40, z * stride + 2); ++j) {
                  const float tap = input[static_cast<std::size_t>((c * 7 + i) * 40 + j)];
                  if (!(most >= tap) && most == most) most = tap;
                  total += tap;
                  count += 1;
                }
              }
              const float wanted = largest ? most : total / count;
              EXPECT(wanted == wanted ? std::fabs(found[at] - wanted) <= 1e-5f : found[at] != found[at]);
            }
          }
        }
      }
    }
  }
}

// (rows, depth) times (depth, columns), of every image, in float64.
std::vector<double> product(const std::vector<double>& left, const std::vector<double>& right, std::size_t images,
                            std::size_t rows, std::size_t depth, std::size_t columns) {
  std::vector<double> result(images * rows * columns);
  for (std::size_t i = 0; i < images * rows * columns; ++i) {
    const std::size_t n = i / (rows * columns), r = i / columns % rows, c = i % columns;
    for (std::size_t d = 0; d < depth; ++d) {
      result[i] += left[(n * rows + r) * depth + d] * right[(n * depth + d) * columns + c];
    }
  }
  return result;
}

bool close(const Values& found, const std::vector<double>& wanted) {
  return close(found, Values(wanted.begin(), wanted.end()));
}

std::vector<double> exactly(const Values& values) { return {values.begin(), values.end()}; }

// The input is cut into what is multiplied, so that matrices do not lie one behind the other.
ACF_TEST(products_are_those_of_their_definition) {
  struct Sizes {
    std::int64_t rows, depth, columns;
  };
  for (const Sizes& sizes : {Sizes{1, 1, 1}, Sizes{3, 17, 5}, Sizes{33, 7, 50}, Sizes{5, 64, 64}, Sizes{70, 3, 197},
                             Sizes{8, 100, 16}, Sizes{40, 33, 129}}) {
    const auto [rows, depth, columns] = sizes;
    const auto r = static_cast<std::size_t>(rows), d = static_cast<std::size_t>(depth),
               c = static_cast<std::size_t>(columns);
    const std::size_t images = 2 * 3;
    const Values left = numbers(images * r * d, 31), right = numbers(images * d * c, 33);
    const std::vector<double> wanted = product(exactly(left), exactly(right), images, r, d, c);
    // Queries are the rows of the left, keys and values those of what is drawn here.
    const Values keys = numbers(images * c * d, 35), values = numbers(images * c * r, 37);
    std::vector<double> turned(images * d * c);
    for (std::size_t i = 0; i < turned.size(); ++i) {
      turned[i] = static_cast<double>(keys[(i / (d * c) * c + i % c) * d + i / c % d]);
    }
    std::vector<double> weights = product(exactly(left), turned, images, r, d, c);
    for (std::size_t i = 0; i < images * r; ++i) {
      double total = 0;
      for (std::size_t j = 0; j < c; ++j) total += weights[i * c + j] = std::exp(0.3 * weights[i * c + j]);
      for (std::size_t j = 0; j < c; ++j) weights[i * c + j] /= total;
    }
    const std::vector<double> mixed = product(weights, exactly(values), images, r, c, r);
    for (const Isa isa : supported_isas()) {
      Network network(isa);
      const int a = network.add_input({3, rows, depth}), b = network.add_input({3, depth, columns}),
                k = network.add_input({3, columns, depth}), v = network.add_input({3, columns, rows});
      network.finish({network.add(matmul(), {a, b}), network.add(attention(0.3f), {a, k, v})});
      const float* in[] = {left.data(), right.data(), keys.data(), values.data()};
      Values first;
      for (const int threads : {1, 3}) {
        Values multiplied(wanted.size()), attended(mixed.size());
        float* out[] = {multiplied.data(), attended.data()};
        network.run(2, 2, in, out, threads);
        EXPECT(close(multiplied, wanted));
        EXPECT(close(attended, mixed));
        multiplied.insert(multiplied.end(), attended.begin(), attended.end());
        if (first.empty()) first = multiplied;
        EXPECT(multiplied == first);
      }
    }
  }
}

ACF_TEST(attention_keeps_nan_and_survives_large_scores) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Isa isa : supported_isas()) {
    Network network(isa);
    const int x = network.add_input({20, 1}), v = network.add_input({20, 2});
    network.finish({network.add(attention(1), {x, x, v})});
    Values scores(20, 0), values = numbers(40, 39), found(40);
    scores[3] = 1000;
    const float* in[] = {scores.data(), values.data()};
    float* out = found.data();
    network.run(1, 1, in, &out, 1);
    EXPECT_EQ(found[6], values[6]);  // the fourth query sees the fourth value alone
    scores[19] = nan;
    network.run(1, 1, in, &out, 1);
    for (const float y : found) EXPECT(y != y);
  }
}

ACF_TEST(steps_that_do_not_fit_are_refused) {
  Network network(Isa::generic);
  const int x = network.add_input({3, 4, 4});
  EXPECT_THROWS(network.add(convolution(window(3, 1, 1), 1, dense(2, 26, 1), {}), {x + 1}), std::invalid_argument,
                "there is no value 1");
  EXPECT_THROWS(network.add(convolution(window(3, 1, 1), 1, dense(2, 28, 1), {}), {x}), std::invalid_argument,
                "columns must be ascending numbers below 27");
  EXPECT_THROWS(network.add(convolution(window(6, 1, 0), 1, dense(2, 27, 1), {}), {x}), std::invalid_argument, "");
  Arithmetic wide;
  wide.residual = narrow::Quantization{};
  EXPECT_THROWS(network.add(convolution(window(3, 1, 1), 1, dense(2, 27, 1), {}, wide), {x}), std::invalid_argument,
                "residuals are rounded beside 8-bit weights alone");
  EXPECT_THROWS(network.add(reshape({5}), {x}), std::invalid_argument, "as many elements");
  EXPECT_THROWS(network.add(expansion(dense(4, 3, 1), {}, window(3, 1, 1), dense(5, 9, 1), {}), {x}),
                std::invalid_argument, "a complete depthwise convolution of all its filters");
  EXPECT_THROWS(network.add(slice(0, 1, 4, 1), {x}), std::invalid_argument, "within its axis");
  EXPECT_THROWS(network.add(take(0, {3}), {x}), std::invalid_argument, "there is no index 3");
  EXPECT_THROWS(network.add(matmul(), {x}), std::invalid_argument, "there must be 2 inputs, got 1");
  EXPECT_THROWS(network.add(matmul(), {x, network.add(reshape({48}), {x})}), std::invalid_argument, "as many matrices");
  EXPECT_THROWS(network.add(matmul(), {x, network.add(slice(1, 0, 3, 1), {x})}), std::invalid_argument,
                "cannot be multiplied by one of 3 rows");
  EXPECT_THROWS(network.add(attention(1), {x, network.add(slice(2, 0, 3, 1), {x}), x}), std::invalid_argument,
                "queries of 4 features do not match keys of 3");
  EXPECT_THROWS(network.add(attention(1), {x, network.add(slice(1, 0, 3, 1), {x}), x}), std::invalid_argument,
                "there are 3 keys for 4 values");
  network.finish({network.add(activate({conv::Activation::relu}), {x})});
  EXPECT_THROWS(run(network, 0, {}), std::invalid_argument, "at least 1");
}

}  // namespace
}  // namespace acf::engine
