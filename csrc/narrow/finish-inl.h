// What makes the sums of some tiles of pixels results: included after conv/finish-inl.h.

using conv::Call;

enum class Adds { nothing, residual, rounded };

// Puts residuals on the numbers that stand for them, NaN on the largest. Kept in registers: what lies in memory would
// be read again after every store, which might have changed it.
struct Rounder {
  explicit Rounder(const Rounding& to)
      : inverse(N::set(to.inverse)), low(N::set(to.low)), high(N::set(to.high)), scale(N::set(to.scale)) {}

  ACF_INLINE Reg operator()(Reg x) const {
    const Reg most = N::smaller(N::mul(x, inverse), high), magic = N::set(kMagic);
    return N::mul(N::sub(N::add(N::max(low, most), magic), magic), scale);
  }

  Reg inverse, low, high, scale;
};

// value(f, sums): of filter f, of the register that lies there, before residual and activation. What many filters have
// in common is outside the loop over these, and the pixels of a filter are written side by side.
template <bool kClamps, Adds kAdds, class Value>
ACF_INLINE void store_tiles(const FinishCall& finish, const Value& value) {
  const Call& call = *finish.call;
  const Reg low = N::set(call.low), high = N::set(call.high);
  const Rounder rounded(kAdds == Adds::rounded ? *finish.rounding : Rounding{});
  typename N::Mask mask[kTogether * kMaxStores];
  for (int i = 0; i < finish.count; ++i) mask[i] = N::mask(finish.stores[i].from, finish.stores[i].to);
  for (int f = 0; f < finish.filters; ++f) {
    const auto of_filter = value(f);
    float* out = call.out + f * call.out_plane;
    const float* residual = kAdds == Adds::nothing ? nullptr : call.residual + f * call.residual_plane;
    for (int i = 0; i < finish.count; ++i) {
      const Store& store = finish.stores[i];
      Reg sum = of_filter(store.sums);
      if constexpr (kAdds != Adds::nothing) {
        Reg added = N::load_masked(residual + store.residual, mask[i]);
        if constexpr (kAdds == Adds::rounded) added = rounded(added);
        sum = N::add(sum, added);
      }
      N::store_masked(out + store.out, mask[i], kClamps ? N::min(high, N::max(low, sum)) : activate(call, sum));
    }
  }
}

template <Adds kAdds, class Value>
ACF_INLINE void finish_tiles(const FinishCall& finish, const Value& value) {
  if (finish.call->clamps) return store_tiles<true, kAdds>(finish, value);
  return store_tiles<false, kAdds>(finish, value);
}

inline void finish_bfloat16(const FinishCall& call) {
  const auto value = [&](int f) {
    const float* sums = static_cast<const float*>(call.sums) + f * kTile;
    const Reg bias = N::broadcast(call.bias + f);
    return [=](std::int32_t at) { return N::add(N::load(sums + at), bias); };
  };
  return call.call->residual != nullptr ? finish_tiles<Adds::residual>(call, value)
                                        : finish_tiles<Adds::nothing>(call, value);
}

inline void finish_int8(const FinishCall& call) {
  const auto value = [&](int f) {
    const std::int32_t* sums = static_cast<const std::int32_t*>(call.sums) + f * kTile;
    const std::int32_t correction = call.corrections[f];
    const Reg multiplier = N::broadcast(call.multipliers + f), bias = N::broadcast(call.bias + f);
    return [=](std::int32_t at) { return N::add(N::mul(N::difference(sums + at, correction), multiplier), bias); };
  };
  if (call.call->residual == nullptr) return finish_tiles<Adds::nothing>(call, value);
  return call.rounding != nullptr ? finish_tiles<Adds::rounded>(call, value)
                                  : finish_tiles<Adds::residual>(call, value);
}
