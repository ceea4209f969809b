#include <immintrin.h>

#include <algorithm>
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

struct Floats {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const unsigned char* from) { return _mm512_loadu_ps(from); }
  static void store(unsigned char* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace

const Kernels avx512_bf16_kernels = {
    N::kLanes, Order::by_row, 4,  0,       {gather_bfloat16, product_by_rows<Floats>, finish_bfloat16},
    {},        copy_rows,     {}, nullptr, nullptr};

}  // namespace acf::narrow
