// N for NEON: see finish-inl.h and kernels-inl.h.

struct N {
  using Reg = float32x4_t;
  struct Mask {
    int from, to;
  };
  static constexpr int kLanes = 4;
  static constexpr bool kMasked = false;
  // 32 registers, but gcc 12 spills beyond about 21 sums.
  static constexpr int max_vectors(Load load, int filters) {
    constexpr int kFit[kMaxFilters] = {6, 6, 5, 4, 4, 3, 3, 2};
    const int fit = kFit[filters - 1];
    return load == Load::stretch || fit < 2 ? fit : 2;
  }
  static constexpr int max_blocks(int pixels) { return pixels == 1 ? 4 : pixels == 2 ? 2 : pixels <= 5 ? 1 : 0; }

  static Mask mask(int from, int to) { return {from, to}; }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Reg r) { vst1q_f32(p, r); }
  static Reg load_masked(const float* p, Mask m) {
    if (m.to - m.from == kLanes) return load(p);
    float lane[kLanes] = {};
    for (int i = m.from; i < m.to; ++i) lane[i] = p[i];
    return vld1q_f32(lane);
  }
  static void store_masked(float* p, Mask m, Reg r) {
    if (m.to - m.from == kLanes) return store(p, r);
    float lane[kLanes];
    vst1q_f32(lane, r);
    for (int i = m.from; i < m.to; ++i) p[i] = lane[i];
  }
  static Reg load_halves(const float* a, const float* b) { return vcombine_f32(vld1_f32(a), vld1_f32(b)); }
  static Reg load_strided(const float* a, const float* b) { return vuzp1q_f32(vld1q_f32(a), vld1q_f32(b)); }
  static Reg difference(const std::int32_t* p, std::int32_t x) {
    return vcvtq_f32_s32(vsubq_s32(vld1q_s32(p), vdupq_n_s32(x)));
  }
  static Reg set(float x) { return vdupq_n_f32(x); }
  static Reg broadcast(const float* p) { return vld1q_dup_f32(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg larger(Reg a, Reg b) { return max(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static Reg smaller(Reg a, Reg b) { return vminnmq_f32(a, b); }
  static Reg pow2(Reg t) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(t), 23);
    return vreinterpretq_f32_s32(vaddq_s32(exponent, vdupq_n_s32(0x3f800000)));
  }
  static Reg choose(unsigned bits, int from, Reg zero, Reg one) {
    const uint32_t lane[kLanes] = {1u << from, 2u << from, 4u << from, 8u << from};
    return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lane)), one, zero);
  }
  static constexpr int kMaxPieces = 1;
  static void transpose_quads(Reg (&r)[4]) {
    const Reg ac_low = vzip1q_f32(r[0], r[2]), ac_high = vzip2q_f32(r[0], r[2]), bd_low = vzip1q_f32(r[1], r[3]),
              bd_high = vzip2q_f32(r[1], r[3]);
    r[0] = vzip1q_f32(ac_low, bd_low);
    r[1] = vzip2q_f32(ac_low, bd_low);
    r[2] = vzip1q_f32(ac_high, bd_high);
    r[3] = vzip2q_f32(ac_high, bd_high);
  }
  static void transpose(const float* const* rows, int from, float* to) {
    for (int m = 0; m < kMaxPixels; m += 4) {
      for (int i = 0; i < kBlock; i += 4) {
        Reg quad[4] = {load(rows[m] + from + i), load(rows[m + 1] + from + i), load(rows[m + 2] + from + i),
                       load(rows[m + 3] + from + i)};
        transpose_quads(quad);
        for (int k = 0; k < 4; ++k) store(to + (i + k) * kMaxPixels + m, quad[k]);
      }
    }
  }
  static bool store_planes(const Call&, const float* const*, int, int) { return false; }
};
