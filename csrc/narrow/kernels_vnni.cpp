#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

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

struct Integers {
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum load(const unsigned char* from) { return _mm512_loadu_si512(from); }
  static void store(unsigned char* to, Sum sum) { _mm512_storeu_si512(to, sum); }
  static Sum dot(Sum sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
};

#include "narrow/bytes_avx512-inl.h"

#include "narrow/depthwise-inl.h"

#include "narrow/depthwise_avx512-inl.h"

}  // namespace

const Kernels vnni_kernels = {
    N::kLanes,
    Order::by_row,
    4,
    0,
    {},
    {gather_int8, product_by_rows<Integers>, finish_int8},
    copy_rows,
    {round_row, finish_row},
    nullptr,
    nullptr,
    {broadcast_int8, finish_bytes, turn_tile, interleave_int8, depthwise_int8, depthwise_bytes, depthwise_rows}};

}  // namespace acf::narrow
