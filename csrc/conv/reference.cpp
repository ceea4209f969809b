#include <algorithm>
#include <cmath>

#include "conv/conv.h"

namespace acf::conv::reference {

double activate(Activation activation, double slope, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::relu6: return std::min(std::max(x, 0.0), 6.0);
    case Activation::leaky: return x > 0 ? x : slope * x;
    case Activation::hardsigmoid: return std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::hardswish: return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::tanh: return std::tanh(x);
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  }
  return x;
}

void run(const Shape& shape, const Pitch& in_pitch, std::int64_t count, const std::int64_t* columns,
         const float* weights, const float* bias, std::int64_t images, const float* in, const Epilogue& epilogue,
         double* out, double* sums) {
  const std::int64_t group_columns = shape.columns() / shape.groups, group_filters = shape.filters / shape.groups;
  for (std::int64_t n = 0; n < images; ++n) {
    const float* weight = weights;
    for (std::int64_t p = 0; p < shape.filters; ++p) {
      const std::int64_t group = p / group_filters;
      const std::int64_t* first = std::lower_bound(columns, columns + count, group * group_columns);
      const std::int64_t* last = std::lower_bound(columns, columns + count, (group + 1) * group_columns);
      for (std::int64_t y = 0; y < shape.out_height(); ++y) {
        for (std::int64_t x = 0; x < shape.out_width(); ++x) {
          double sum = bias == nullptr ? 0 : static_cast<double>(bias[p]), size = std::abs(sum);
          for (const std::int64_t* column = first; column != last; ++column) {
            const std::int64_t kw = *column % shape.kernel_w, kh = *column / shape.kernel_w % shape.kernel_h,
                               c = *column / shape.kernel_w / shape.kernel_h;
            const std::int64_t from_y = y * shape.stride_h - shape.padding.top + kh * shape.dilation_h,
                               from_x = x * shape.stride_w - shape.padding.left + kw * shape.dilation_w;
            if (from_y < 0 || from_y >= shape.height || from_x < 0 || from_x >= shape.width) continue;
            const double product =
                static_cast<double>(weight[column - first]) *
                static_cast<double>(in[n * in_pitch.image + c * in_pitch.plane + from_y * in_pitch.row + from_x]);
            sum += product;
            size += std::abs(product);
          }
          if (epilogue.residual != nullptr) {
            const Pitch& pitch = epilogue.residual_pitch;
            const auto residual =
                static_cast<double>(epilogue.residual[n * pitch.image + p * pitch.plane + y * pitch.row + x]);
            sum += residual;
            size += std::abs(residual);
          }
          *out++ = activate(epilogue.activation, static_cast<double>(epilogue.slope), sum);
          if (sums != nullptr) *sums++ = size;
        }
      }
      weight += last - first;
    }
  }
}

}  // namespace acf::conv::reference
