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
    scores(w.data(), shape, options, importance.data(), emptiness.data(), columns.data(), filters.data());
    EXPECT(importance == (std::vector<double>{12.5, 0.5, 0, 4}));
    EXPECT(emptiness == (std::vector<double>{0.5, 0.5, 0, 1}));
    EXPECT(columns == (std::vector<double>{5, 0, 0, 1, 0, 0, 2, 2}));
    EXPECT(filters == (std::vector<double>{3, std::sqrt(17.0), std::sqrt(8.0), 0}));
  }
}

}  // namespace
}  // namespace acf::purification
