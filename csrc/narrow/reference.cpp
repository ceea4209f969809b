#include <algorithm>
#include <cmath>
#include <cstring>

#include "narrow/narrow.h"

namespace acf::narrow::reference {

float rounded_to_bfloat16(float x) {
  if (std::isnan(x)) return x;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  bits += 0x7fff + ((bits >> 16) & 1);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

std::int32_t quantized(float x, const Quantization& input) {
  const float inverse = 1.0f / input.scale, scaled = x * inverse;
  if (std::isnan(scaled) || scaled > 65536.0f) return 255;
  if (scaled < -65536.0f) return 0;
  return std::clamp(static_cast<std::int32_t>(std::nearbyint(scaled)) + input.zero, 0, 255);
}

void run(const conv::Shape& shape, const conv::Pitch& in_pitch, std::int64_t count, const std::int64_t* columns,
         const float* weights, const float* scales, const Quantization& input, const float* bias, std::int64_t images,
         const float* in, const conv::Epilogue& epilogue, float* out) {
  const std::int64_t group_columns = shape.columns() / shape.groups, group_filters = shape.filters / shape.groups;
  for (std::int64_t n = 0; n < images; ++n) {
    const float* weight = weights;
    for (std::int64_t p = 0; p < shape.filters; ++p) {
      const std::int64_t group = p / group_filters;
      const std::int64_t* first = std::lower_bound(columns, columns + count, group * group_columns);
      const std::int64_t* last = std::lower_bound(columns, columns + count, (group + 1) * group_columns);
      for (std::int64_t y = 0; y < shape.out_height(); ++y) {
        for (std::int64_t x = 0; x < shape.out_width(); ++x) {
          std::int32_t sum = 0;
          for (const std::int64_t* column = first; column != last; ++column) {
            const std::int64_t kw = *column % shape.kernel_w, kh = *column / shape.kernel_w % shape.kernel_h,
                               c = *column / shape.kernel_w / shape.kernel_h;
            const std::int64_t from_y = y * shape.stride_h - shape.padding.top + kh * shape.dilation_h,
                               from_x = x * shape.stride_w - shape.padding.left + kw * shape.dilation_w;
            if (from_y < 0 || from_y >= shape.height || from_x < 0 || from_x >= shape.width) continue;
            const float value = in[n * in_pitch.image + c * in_pitch.plane + from_y * in_pitch.row + from_x];
            sum += (quantized(value, input) - input.zero) * static_cast<std::int32_t>(weight[column - first]);
          }
          const float multiplier = input.scale * scales[p];
          float result = static_cast<float>(sum) * multiplier;
          result += bias == nullptr ? 0.0f : bias[p];
          if (epilogue.residual != nullptr) {
            const conv::Pitch& pitch = epilogue.residual_pitch;
            result += epilogue.residual[n * pitch.image + p * pitch.plane + y * pitch.row + x];
          }
          *out++ = static_cast<float>(conv::reference::activate(
              epilogue.activation, static_cast<double>(epilogue.slope), static_cast<double>(result)));
        }
      }
      weight += last - first;
    }
  }
}

}  // namespace acf::narrow::reference
