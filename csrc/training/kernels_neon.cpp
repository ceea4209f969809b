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
};

// 32 registers, but gcc 12 spills beyond about 21 sums.
constexpr int kSums = 20, kDotsA = 4, kDotsB = 5;

#include "training/kernels-inl.h"

}  // namespace

const Kernels neon_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxDotsB>::type{});

}  // namespace acf::training
