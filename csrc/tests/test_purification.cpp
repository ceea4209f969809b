#include "purification/purification.h"

#include <cmath>
#include <vector>

#include "core/isa.h"
#include "tests/testing.h"

namespace acf::purification {
namespace {

// Two blocks of two filters, two channels of two taps each.
ACF_TEST(scores_of_a_small_weight) {
  const std::vector<float> w = {
      3, 0, 0, 0,  //
      4, 0, 0, 1,  //
      0, 0, 2, 2,  //
      0, 0, 0, 0,  //
  };
  projection::Shape shape;
  shape.rows = 4;
  shape.columns = 4;
  shape.groups = 2;
  shape.taps = 2;
  for (const Isa isa : supported_isas()) {
    projection::Options options;
    options.isa = isa;
    std::vector<double> importance(4), emptiness(4), columns(8), filters(4);
    const Layer<float> layer = {w.data(), shape, importance.data(), emptiness.data(), columns.data(), filters.data()};
    scores(&layer, 1, options);
    EXPECT(importance == (std::vector<double>{12.5, 0.5, 0, 4}));
    EXPECT(emptiness == (std::vector<double>{0.5, 0.5, 0, 1}));
    EXPECT(columns == (std::vector<double>{5, 0, 0, 1, 0, 0, 2, 2}));
    EXPECT(filters == (std::vector<double>{3, std::sqrt(17.0), std::sqrt(8.0), 0}));
  }
}

// The second filter's channel 0 is small; filters 0 and 2 are tied and 1 and 3 are on their own.
ACF_TEST(what_stays_of_a_small_layer) {
  Judged layer;
  layer.shape.rows = 4;
  layer.shape.columns = 4;
  layer.shape.taps = 2;
  const std::vector<double> importance = {0.5, 9}, columns = {1, 0, 3, 0.5}, filters = {0.6, 2, 0.8, 0.9};
  const std::vector<std::int64_t> tied = {0, 1, 0, -1};
  std::vector<std::uint8_t> kept_columns(4), kept_filters(4);
  layer.importance = importance.data();
  layer.column_norms = columns.data();
  layer.filter_norms = filters.data();
  layer.tied = tied.data();
  layer.columns = kept_columns.data();
  layer.filters = kept_filters.data();
  layer.limits = {0.75, 1, 2, 1};
  keep(&layer, 1, 2);
  EXPECT(kept_columns == (std::vector<std::uint8_t>{0, 0, 1, 0}));
  EXPECT(kept_filters == (std::vector<std::uint8_t>{1, 1, 1, 1}));
  layer.limits = {0, 1, 0.5, 1.5};  // half of channel 0 is left: not below the limit
  keep(&layer, 1, 2);
  EXPECT(kept_columns == (std::vector<std::uint8_t>{1, 0, 1, 1}));
  EXPECT(kept_filters == (std::vector<std::uint8_t>{0, 1, 0, 1}));
}

}  // namespace
}  // namespace acf::purification
