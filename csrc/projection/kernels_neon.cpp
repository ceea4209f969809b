#include <arm_neon.h>

#include "projection/kernels.h"

namespace acf::projection {
namespace {

struct F32 {
  using Scalar = float;
  using Key = std::int32_t;
  static constexpr int kLanes = 4, kDoubles = 2;
  using Reg = float32x4_t;
  using Int = int32x4_t;
  using Mask = uint32x4_t;
  using Double = float64x2_t;

  static Reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Reg r) { vst1q_f32(p, r); }
  static Reg load_first(const float* p, int n) {
    float lane[kLanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_f32(lane);
  }
  static void store_first(float* p, int n, Reg r) {
    float lane[kLanes];
    vst1q_f32(lane, r);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  static Int load_keys(const Key* p) { return vld1q_s32(p); }
  static Int load_keys_first(const Key* p, int n) {
    Key lane[kLanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_s32(lane);
  }
  static void store_keys(Key* p, Int k) { vst1q_s32(p, k); }
  static Int set_key(Key value) { return vdupq_n_s32(value); }
  static Reg zero() { return vdupq_n_f32(0); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg scale(Reg a, double) { return a; }
  static Int bits(Reg r) { return vreinterpretq_s32_f32(r); }
  static Int key(Reg r) { return vandq_s32(bits(r), vdupq_n_s32(0x7fffffff)); }
  static Int or_keys(Int a, Int b) { return vorrq_s32(a, b); }
  static Int max_keys(Int a, Int b) { return vmaxq_s32(a, b); }
  static bool any(Int k) { return vmaxvq_u32(vreinterpretq_u32_s32(k)) != 0; }
  static Mask greater(Int a, Int b) { return vcgtq_s32(a, b); }
  static Mask mask_of(Int k) { return vreinterpretq_u32_s32(k); }
  static Mask and_mask(Mask a, Mask b) { return vandq_u32(a, b); }
  static Mask not_mask(Mask a) { return vmvnq_u32(a); }
  static Reg keep(Mask m, Reg r) { return vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(r))); }
  static Reg drop(Mask m, Reg r) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(r), m)); }
  static Int count_lanes(Int counts, Mask m) { return vsubq_s32(counts, vreinterpretq_s32_u32(m)); }
  static int compress(Key* out, Int k, Mask m) {
    Key lane[kLanes];
    std::uint32_t kept[kLanes];
    vst1q_s32(lane, k);
    vst1q_u32(kept, vshrq_n_u32(m, 31));
    int total = 0;
    for (int i = 0; i < kLanes; ++i) {
      out[total] = lane[i];
      total += static_cast<int>(kept[i]);
    }
    return total;
  }
  static Double load_doubles(const double* p) { return vld1q_f64(p); }
  static void store_doubles(double* p, Double d) { vst1q_f64(p, d); }
  static Double add_doubles(Double a, Double b) { return vaddq_f64(a, b); }
  static void add_squares(Double* sums, Reg r) {
    const Double low = vcvt_f64_f32(vget_low_f32(r)), high = vcvt_high_f64_f32(r);
    sums[0] = vfmaq_f64(sums[0], low, low);
    sums[1] = vfmaq_f64(sums[1], high, high);
  }
};

struct F64 {
  using Scalar = double;
  using Key = std::int64_t;
  static constexpr int kLanes = 2, kDoubles = 2;
  using Reg = float64x2_t;
  using Int = int64x2_t;
  using Mask = uint64x2_t;
  using Double = float64x2_t;

  static Reg load(const double* p) { return vld1q_f64(p); }
  static void store(double* p, Reg r) { vst1q_f64(p, r); }
  static Reg load_first(const double* p, int n) {
    double lane[kLanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_f64(lane);
  }
  static void store_first(double* p, int n, Reg r) {
    double lane[kLanes];
    vst1q_f64(lane, r);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  static Int load_keys(const Key* p) { return vld1q_s64(p); }
  static Int load_keys_first(const Key* p, int n) {
    Key lane[kLanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_s64(lane);
  }
  static void store_keys(Key* p, Int k) { vst1q_s64(p, k); }
  static Int set_key(Key value) { return vdupq_n_s64(value); }
  static Reg zero() { return vdupq_n_f64(0); }
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg scale(Reg a, double factor) { return vmulq_n_f64(a, factor); }
  static Int bits(Reg r) { return vreinterpretq_s64_f64(r); }
  static Int key(Reg r) { return vandq_s64(bits(r), vdupq_n_s64(0x7fffffffffffffff)); }
  static Int or_keys(Int a, Int b) { return vorrq_s64(a, b); }
  static Int max_keys(Int a, Int b) { return vbslq_s64(vcgtq_s64(a, b), a, b); }
  static bool any(Int k) { return (vgetq_lane_s64(k, 0) | vgetq_lane_s64(k, 1)) != 0; }
  static Mask greater(Int a, Int b) { return vcgtq_s64(a, b); }
  static Mask mask_of(Int k) { return vreinterpretq_u64_s64(k); }
  static Mask and_mask(Mask a, Mask b) { return vandq_u64(a, b); }
  static Mask not_mask(Mask a) { return vreinterpretq_u64_u32(vmvnq_u32(vreinterpretq_u32_u64(a))); }
  static Reg keep(Mask m, Reg r) { return vreinterpretq_f64_u64(vandq_u64(m, vreinterpretq_u64_f64(r))); }
  static Reg drop(Mask m, Reg r) { return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(r), m)); }
  static Int count_lanes(Int counts, Mask m) { return vsubq_s64(counts, vreinterpretq_s64_u64(m)); }
  static int compress(Key* out, Int k, Mask m) {
    const Mask kept = vshrq_n_u64(m, 63);
    const int one = static_cast<int>(vgetq_lane_u64(kept, 0));
    out[0] = vgetq_lane_s64(k, 0);
    out[one] = vgetq_lane_s64(k, 1);
    return one + static_cast<int>(vgetq_lane_u64(kept, 1));
  }
  static Double load_doubles(const double* p) { return vld1q_f64(p); }
  static void store_doubles(double* p, Double d) { vst1q_f64(p, d); }
  static Double add_doubles(Double a, Double b) { return vaddq_f64(a, b); }
  static void add_squares(Double* sums, Reg r) { *sums = vaddq_f64(*sums, vmulq_f64(r, r)); }
};

#include "projection/kernels-inl.h"

}  // namespace

const Kernels<float> neon_f32 = ACF_KERNEL_TABLE(F32);
const Kernels<double> neon_f64 = ACF_KERNEL_TABLE(F64);

}  // namespace acf::projection
