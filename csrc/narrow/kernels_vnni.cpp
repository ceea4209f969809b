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

void product_int8(const ProductCall& call) {
  product_by_rows(
      call, _mm512_setzero_si512(), [](__m512i sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); },
      [](unsigned char* to, __m512i sum) { _mm512_storeu_si512(to, sum); });
}

}  // namespace

const Kernels vnni_kernels = {N::kLanes, Order::by_row, 0, {}, {gather_int8, product_int8, finish_int8},
                              nullptr,   nullptr};

}  // namespace acf::narrow
