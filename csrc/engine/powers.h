// Powers of e, as softmax and attention need them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace acf::engine {

// e^x for x <= 0, within 2 units in the last place, and NaN for NaN; written so that compilers put it into lanes.
inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added to a number it leaves an integer in the low bits
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + kMagic, n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Scores, scaled, become the powers of e by how far they lie below the largest: the softmax but for their sum.
inline void to_powers(float* scores, std::int64_t count, float scale) {
  constexpr std::int64_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, scores[0] * scale);
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) {
      scores[i + j] *= scale;
      lanes[j] = lanes[j] < scores[i + j] ? scores[i + j] : lanes[j];
    }
  }
  for (std::int64_t i = whole; i < count; ++i) {
    scores[i] *= scale;
    lanes[0] = lanes[0] < scores[i] ? scores[i] : lanes[0];
  }
  const float most = *std::max_element(lanes, lanes + kLanes);
  for (std::int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - most);
}

}  // namespace acf::engine
