#include "bindings/weights.h"

#include "core/check.h"

namespace acf::bindings {

using projection::NotFinite;
using projection::Options;
using projection::Shape;

namespace {

std::string multi_index(std::int64_t flat, const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> index(shape.size());
  for (std::size_t axis = shape.size(); axis-- > 0; flat /= shape[axis]) index[axis] = flat % shape[axis];
  return shape_text(index);
}

}  // namespace

Shape shape_of(const Array& weight, std::int64_t groups) {
  const std::vector<std::int64_t>& extents = weight.shape;
  ACF_CHECK(extents.size() >= 2, "weight must have at least 2 dimensions (filters, channels, kernel...), got shape ",
            shape_text(extents));
  ACF_CHECK(weight.size() > 0, "weight must not be empty, got shape ", shape_text(extents));
  ACF_CHECK(groups >= 1 && extents[0] % groups == 0, "groups must be at least 1 and divide the ", extents[0],
            " filters of the weight, got ", groups);
  Shape shape;
  shape.rows = extents[0];
  shape.columns = weight.size() / extents[0];
  shape.taps = shape.columns / extents[1];
  shape.groups = groups;
  return shape;
}

Options options_of(int threads) {
  ACF_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
  Options options;
  options.threads = threads;
  return options;
}

void rethrow(const NotFinite& error, const std::vector<std::int64_t>& shape, const std::string& owner) {
  const char* array = error.array == NotFinite::Array::weight ? "weight"
                      : error.array == NotFinite::Array::dual ? "u"
                                                              : "weight + u";
  detail::fail<std::invalid_argument>(array, owner, " has ", error.count, error.count == 1 ? " value" : " values",
                                      " that ", error.count == 1 ? "is" : "are",
                                      " NaN or infinite, the first at flat index ", error.first, ", index ",
                                      multi_index(error.first, shape));
}

}  // namespace acf::bindings
