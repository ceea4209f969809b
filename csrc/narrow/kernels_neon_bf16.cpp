#include <arm_neon.h>

#include <cstring>

#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using namespace conv;

#include "core/unrolled-inl.h"

#include "conv/registers_neon-inl.h"

#include "conv/finish-inl.h"

#include "narrow/finish-inl.h"

#include "narrow/gather-inl.h"

#include "narrow/products_neon-inl.h"

// Eight pixels in bfloat16.
uint16x8_t rounded(const float* pixels) {
  return vcombine_u16(vreinterpret_u16_bf16(vcvt_bf16_f32(vld1q_f32(pixels))),
                      vreinterpret_u16_bf16(vcvt_bf16_f32(vld1q_f32(pixels + 4))));
}

void gather_bfloat16(const GatherCall& call) {
  gather_rows<2>(call, [](const float(&pixels)[2][kTile], unsigned char* to) {
    for (int half = 0; half < kTile; half += 8) {
      uint16x8x2_t pairs;
      pairs.val[0] = rounded(pixels[0] + half);
      pairs.val[1] = rounded(pixels[1] + half);
      vst2q_u16(reinterpret_cast<std::uint16_t*>(to) + 2 * half, pairs);
    }
  });
}

void product_bfloat16(const ProductCall& call) {
  product_by_rows(call, [](int32x4_t sum, int8x16_t x, int8x16_t w) {
    return vreinterpretq_s32_f32(
        vbfdotq_f32(vreinterpretq_f32_s32(sum), vreinterpretq_bf16_s8(x), vreinterpretq_bf16_s8(w)));
  });
}

}  // namespace

const Kernels neon_bf16_kernels = {
    N::kLanes, Order::by_row, 0,  0,       {gather_bfloat16, product_bfloat16, finish_bfloat16},
    {},        copy_rows,     {}, nullptr, nullptr};

}  // namespace acf::narrow
