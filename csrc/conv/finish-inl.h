// Activations, and what follows the sums of a tile: included once per kernels_<isa>.cpp inside its anonymous namespace,
// after the registers_<isa>-inl.h that defines N (see kernels-inl.h).

using Reg = N::Reg;

ACF_INLINE const float* at(const float* p, std::int64_t bytes) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(p) + bytes);
}

// ---- activations ----------------------------------------------------------------------------------------------------

// 1.5 * 2^23: a float of this size has no fraction, so adding it rounds to the nearest integer, which is then found in
// the low bits.
inline constexpr float kMagic = 12582912.0f;

// e^x for |x| <= 87, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2 and Cephes' polynomial for e^r.
inline Reg exp(Reg x) {
  const Reg t = N::fma(x, N::set(1.44269504088896341f), N::set(kMagic));
  const Reg n = N::sub(t, N::set(kMagic));
  const Reg r = N::fma(n, N::set(2.12194440e-4f), N::fma(n, N::set(-0.693359375f), x));
  Reg p = N::set(1.9875691500e-4f);
  p = N::fma(p, r, N::set(1.3981999507e-3f));
  p = N::fma(p, r, N::set(8.3334519073e-3f));
  p = N::fma(p, r, N::set(4.1665795894e-2f));
  p = N::fma(p, r, N::set(1.6666665459e-1f));
  p = N::fma(p, r, N::set(5.0000001201e-1f));
  p = N::add(N::fma(p, N::mul(r, r), r), N::set(1.0f));
  return N::mul(p, N::pow2(t));
}

inline Reg clamp(Reg x, float low, float high) { return N::min(N::set(high), N::max(N::set(low), x)); }

inline Reg sigmoid(Reg x) {
  const Reg one = N::set(1.0f);
  return N::div(one, N::add(one, exp(clamp(N::sub(N::set(0.0f), x), -87.0f, 87.0f))));
}

// x / 2 * (1 + erf(x / sqrt(2))), with erf(z) = 1 - p(1 / (1 + 0.3275911 z)) * e^(-z^2) for z >= 0, within 1.5e-7
// (Abramowitz and Stegun, 7.1.26).
inline Reg gelu(Reg x) {
  const Reg one = N::set(1.0f), zero = N::set(0.0f);
  const Reg size = N::max(N::sub(zero, x), x), z = N::mul(size, N::set(0.70710678118654752f));
  const Reg t = N::div(one, N::fma(z, N::set(0.3275911f), one));
  Reg p = N::set(1.061405429f);
  p = N::fma(p, t, N::set(-1.453152027f));
  p = N::fma(p, t, N::set(1.421413741f));
  p = N::fma(p, t, N::set(-0.284496736f));
  p = N::fma(p, t, N::set(0.254829592f));
  const Reg rest = N::mul(N::mul(p, t), exp(clamp(N::sub(zero, N::mul(z, z)), -87.0f, 0.0f)));
  return N::sub(N::max(zero, x), N::mul(N::mul(N::set(0.5f), size), rest));
}

// Not inlined: copies in all kernels would take long to compile, and a call is little beside what it does.
__attribute__((noinline)) inline Reg activate_smoothly(const Call& call, Reg x) {
  const Reg sixth = N::set(1.0f / 6);
  switch (call.activation) {
    case Activation::leaky: return N::fma(N::min(N::set(0.0f), x), N::set(call.slope), N::max(N::set(0.0f), x));
    case Activation::hardsigmoid: return N::mul(clamp(N::add(x, N::set(3.0f)), 0.0f, 6.0f), sixth);
    case Activation::hardswish: return N::mul(x, N::mul(clamp(N::add(x, N::set(3.0f)), 0.0f, 6.0f), sixth));
    case Activation::sigmoid: return sigmoid(x);
    case Activation::silu: return N::mul(x, sigmoid(x));
    case Activation::tanh: return N::fma(N::set(2.0f), sigmoid(N::add(x, x)), N::set(-1.0f));
    case Activation::gelu: return gelu(x);
    default: return x;
  }
}

ACF_INLINE Reg activate(const Call& call, Reg x) {
  return call.clamps ? clamp(x, call.low, call.high) : activate_smoothly(call, x);
}

// ---- what follows the sums ------------------------------------------------------------------------------------------

// Adds the residual, activates and stores vector v of the tile for `filters` filters, whose sums lie `pitch` apart.
__attribute__((noinline)) inline void finish(const Call& call, int v, int filters, const float* sums, int pitch) {
  const Segment* first = call.tile->segments + call.tile->first[v];
  const Segment* last = call.tile->segments + call.tile->first[v + 1];
  for (int f = 0; f < filters; ++f) {
    Reg sum = N::load(sums + f * pitch);
    if (call.residual != nullptr) {
      const float* residual = call.residual + f * call.residual_plane;
      for (const Segment* s = first; s != last; ++s) {
        sum = N::add(sum, N::load_masked(residual + s->residual, N::mask(s->from, s->to)));
      }
    }
    sum = activate(call, sum);
    float* out = call.out + f * call.out_plane;
    for (const Segment* s = first; s != last; ++s) N::store_masked(out + s->out, N::mask(s->from, s->to), sum);
  }
}
