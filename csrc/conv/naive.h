// The loops of a convolution as its definition has them, for references.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv/conv.h"

namespace acf::conv::reference {

struct Output {
  std::int64_t image, filter, y, x;

  std::int64_t at(const Pitch& pitch) const { return image * pitch.image + filter * pitch.plane + y * pitch.row + x; }
};

// body(output, taps) for every output, in order. taps(each) calls each(weight, input) for every kept column that reads
// no padding: the numbers of both among the weights of all filters and from element (0, 0, 0, 0) of the input.
template <class Body>
void each_output(const Shape& shape, const Pitch& in, std::int64_t count, const std::int64_t* columns,
                 std::int64_t images, const Body& body) {
  const std::int64_t group_columns = shape.columns() / shape.groups, group_filters = shape.filters / shape.groups;
  for (std::int64_t n = 0; n < images; ++n) {
    std::int64_t weights = 0;  // of the filters before
    for (std::int64_t p = 0; p < shape.filters; ++p) {
      const std::int64_t group = p / group_filters;
      const std::int64_t* first = std::lower_bound(columns, columns + count, group * group_columns);
      const std::int64_t* last = std::lower_bound(columns, columns + count, (group + 1) * group_columns);
      for (std::int64_t y = 0; y < shape.out_height(); ++y) {
        for (std::int64_t x = 0; x < shape.out_width(); ++x) {
          body(Output{n, p, y, x}, [&](const auto& each) {
            for (const std::int64_t* column = first; column != last; ++column) {
              const std::int64_t kw = *column % shape.kernel_w, kh = *column / shape.kernel_w % shape.kernel_h,
                                 c = *column / shape.kernel_w / shape.kernel_h;
              const std::int64_t from_y = y * shape.stride_h - shape.padding.top + kh * shape.dilation_h,
                                 from_x = x * shape.stride_w - shape.padding.left + kw * shape.dilation_w;
              if (from_y < 0 || from_y >= shape.height || from_x < 0 || from_x >= shape.width) continue;
              each(weights + (column - first), n * in.image + c * in.plane + from_y * in.row + from_x);
            }
          });
        }
      }
      weights += last - first;
    }
  }
}

}  // namespace acf::conv::reference
