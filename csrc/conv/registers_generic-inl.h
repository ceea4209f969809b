// N for vectors of four floats in plain C++: see finish-inl.h and kernels-inl.h.

struct N {
  using Reg = float __attribute__((vector_size(16)));
  using Int = std::int32_t __attribute__((vector_size(16)));
  struct Mask {
    int from, to;
  };
  static constexpr int kLanes = 4;
  static constexpr bool kMasked = false;
  static constexpr int max_vectors(Load load, int filters) {
    constexpr int kFit[kMaxFilters] = {6, 4, 3, 2, 2};
    const int fit = kFit[filters - 1];
    return load == Load::stretch || fit < 2 ? fit : 2;
  }
  static constexpr int max_blocks(int pixels) { return pixels <= 2 ? 1 : 0; }

  static Mask mask(int from, int to) { return {from, to}; }
  static Reg load(const float* p) {
    Reg r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  static void store(float* p, Reg r) { std::memcpy(p, &r, sizeof(r)); }
  static Reg load_masked(const float* p, Mask m) {
    Reg r = {};
    for (int i = m.from; i < m.to; ++i) r[i] = p[i];
    return r;
  }
  static void store_masked(float* p, Mask m, Reg r) {
    for (int i = m.from; i < m.to; ++i) p[i] = r[i];
  }
  static Reg load_halves(const float* a, const float* b) { return Reg{a[0], a[1], b[0], b[1]}; }
  static Reg load_strided(const float* a, const float* b) { return Reg{a[0], a[2], b[0], b[2]}; }
  static Reg difference(const std::int32_t* p, std::int32_t x) {
    Reg r;
    for (int i = 0; i < kLanes; ++i) r[i] = static_cast<float>(p[i] - x);
    return r;
  }
  static Reg set(float x) { return Reg{x, x, x, x}; }
  static Reg broadcast(const float* p) { return set(*p); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg larger(Reg a, Reg b) { return ((a > b) | (a != a)) ? a : b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg smaller(Reg a, Reg b) { return min(a, b); }
  static Reg pow2(Reg t) {
    Int bits;
    std::memcpy(&bits, &t, sizeof(bits));
    bits = (bits << 23) + 0x3f800000;
    std::memcpy(&t, &bits, sizeof(t));
    return t;
  }
  static Reg choose(unsigned bits, int from, Reg zero, Reg one) {
    for (int i = 0; i < kLanes; ++i) zero[i] = (bits >> (from + i) & 1) != 0 ? one[i] : zero[i];
    return zero;
  }
  static constexpr int kMaxPieces = 1;
  static void transpose_quads(Reg (&r)[4]) {
    const Reg a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Reg{a[i], b[i], c[i], d[i]};
  }
  static void transpose(const float* const* rows, int from, float* to) {
    for (int i = 0; i < kBlock; ++i) {
      for (int m = 0; m < kMaxPixels; ++m) to[i * kMaxPixels + m] = rows[m][from + i];
    }
  }
  static bool store_planes(const Call&, const float* const*, int, int) { return false; }
};
