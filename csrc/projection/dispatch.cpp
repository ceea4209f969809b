#include "core/check.h"
#include "projection/kernels.h"

namespace acf::projection {
namespace {

#if defined(__x86_64__)
#define ACF_PICK(type, isa)                 \
  switch (isa) {                            \
    case Isa::avx512: return avx512_##type; \
    case Isa::avx2: return avx2_##type;     \
    default: return generic_##type;         \
  }
#elif defined(__aarch64__)
#define ACF_PICK(type, isa) return isa == Isa::neon ? neon_##type : generic_##type;
#else
#define ACF_PICK(type, isa) return generic_##type;
#endif

void check_supported(Isa isa) {
  for (Isa supported : supported_isas()) {
    if (supported == isa) return;
  }
  ACF_CHECK(false, "this machine cannot run the ISA '", isa_name(isa), "'");
}

}  // namespace

template <>
const Kernels<float>& kernels<float>(Isa isa) {
  check_supported(isa);
  ACF_PICK(f32, isa)
}

template <>
const Kernels<double>& kernels<double>(Isa isa) {
  check_supported(isa);
  ACF_PICK(f64, isa)
}

template <class T>
double sum_lanes(const double (&lanes)[kBlock], const T (&run)[kBlock]) {
  double sums[kBlock];
  for (int i = 0; i < kBlock; ++i) sums[i] = lanes[i] + static_cast<double>(run[i]);
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template double sum_lanes<float>(const double (&)[kBlock], const float (&)[kBlock]);
template double sum_lanes<double>(const double (&)[kBlock], const double (&)[kBlock]);

}  // namespace acf::projection
