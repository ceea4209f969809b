#include <immintrin.h>

#include <cstring>

#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using namespace conv;

#include "core/unrolled-inl.h"

#include "conv/registers_avx512-inl.h"

#include "conv/finish-inl.h"

#include "narrow/finish-inl.h"

#include "narrow/gather_avx512-inl.h"

#include "narrow/products_avx512-inl.h"

void product_bfloat16(const ProductCall& call) {
  product_by_rows(
      call, _mm512_setzero_ps(),
      [](__m512 sum, __m512i x, __m512i w) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
      },
      [](unsigned char* to, __m512 sum) { _mm512_storeu_ps(to, sum); });
}

}  // namespace

const Kernels avx512_bf16_kernels = {
    N::kLanes, Order::by_row, 0, {gather_bfloat16, product_bfloat16, finish_bfloat16}, {}, nullptr, nullptr};

}  // namespace acf::narrow
