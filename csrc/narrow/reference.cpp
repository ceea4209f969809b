#include <algorithm>
#include <cmath>
#include <cstring>

#include "conv/naive.h"
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
         const float* in, const conv::Epilogue& epilogue, const Quantization* residual, float* out) {
  using conv::reference::Output;
  conv::reference::each_output(shape, in_pitch, count, columns, images, [&](const Output& output, const auto& taps) {
    std::int32_t sum = 0;
    taps([&](std::int64_t weight, std::int64_t from) {
      sum += (quantized(in[from], input) - input.zero) * static_cast<std::int32_t>(weights[weight]);
    });
    const float multiplier = input.scale * scales[output.filter];
    float result = static_cast<float>(sum) * multiplier;
    result += bias == nullptr ? 0.0f : bias[output.filter];
    if (epilogue.residual != nullptr) {
      const float added = epilogue.residual[output.at(epilogue.residual_pitch)];
      result += residual == nullptr
                    ? added
                    : static_cast<float>(quantized(added, *residual) - residual->zero) * residual->scale;
    }
    *out++ = static_cast<float>(conv::reference::activate(epilogue.activation, static_cast<double>(epilogue.slope),
                                                          static_cast<double>(result)));
  });
}

}  // namespace acf::narrow::reference
