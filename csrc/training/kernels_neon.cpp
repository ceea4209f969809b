#include <arm_neon.h>
#include "core/inline.h"
#include "training/kernels.h"

namespace acf::training {
namespace {

struct N {
  using Reg = float32x4_t;
  static constexpr int kLanes = 4;
  static Reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Reg r) { vst1q_f32(p, r); }
  static Reg load_some(const float* p, int n) {
    float lane[kLanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_f32(lane);
  }
  static void store_some(float* p, Reg r, int n) {
    float lane[kLanes];
    vst1q_f32(lane, r);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  static Reg set(float x) { return vdupq_n_f32(x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static float total(Reg r) { return vaddvq_f32(r); }
  // Rows become columns.
  static void transpose(Reg (&r)[kLanes]) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }
};

// 32 registers, but gcc 12 spills beyond about 21 sums.
constexpr int kSums = 20;

#include "training/kernels-inl.h"

}  // namespace

const Kernels neon_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxOuterRows>::type{});

}  // namespace acf::training
