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

#include "narrow/gather_neon-inl.h"

#include "narrow/gather-inl.h"

void gather_int8(const GatherCall& call) {
  gather_rows<4>(call, [&call](const float(&pixels)[4][kTile], unsigned char* to) {
    W::quantize(pixels, call.inverse, call.zero, to);
  });
}

#include "narrow/products_neon-inl.h"

void product_int8(const ProductCall& call) {
  product_by_rows(call, [](int32x4_t sum, int8x16_t x, int8x16_t w) { return vdotq_s32(sum, x, w); });
}

}  // namespace

const Kernels dotprod_kernels = {
    N::kLanes, Order::by_row,           0,       128,    {}, {gather_int8, product_int8, finish_int8},
    copy_rows, {round_row, finish_row}, nullptr, nullptr};

}  // namespace acf::narrow
