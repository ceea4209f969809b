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

// body(place, load, store): of every register of a row, the last one in part.
template <class Body>
ACF_INLINE void each_register(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + N::kLanes <= count; i += N::kLanes) {
    body(
        i, [](const float* p) { return N::load(p); }, [](float* p, Reg r) { N::store(p, r); });
  }
  if (i == count) return;
  const auto mask = N::mask(0, static_cast<int>(count - i));
  body(
      i, [mask](const float* p) { return N::load_masked(p, mask); },
      [mask](float* p, Reg r) { N::store_masked(p, mask, r); });
}

inline void round_row(const Rounding& to, const float* in, float* out, std::int64_t count) {
  const Rounder rounded(to);
  each_register(count, [&](std::int64_t i, auto load, auto store) { store(out + i, rounded(load(in + i))); });
}

template <bool kClamps, Adds kAdds>
ACF_INLINE void finish_row_of(const RowFinishCall& finish) {
  const Call& call = *finish.call;
  const Reg multiplier = N::set(finish.multiplier), bias = N::set(finish.bias), low = N::set(call.low),
            high = N::set(call.high);
  const Rounder rounded(kAdds == Adds::rounded ? *finish.rounding : Rounding{});
  each_register(finish.count, [&](std::int64_t i, auto load, auto store) {
    Reg y = N::add(N::mul(load(finish.sums + i), multiplier), bias);
    if constexpr (kAdds == Adds::residual) y = N::add(y, load(finish.residual + i));
    if constexpr (kAdds == Adds::rounded) y = N::add(y, rounded(load(finish.residual + i)));
    store(finish.sums + i, kClamps ? N::min(high, N::max(low, y)) : activate(call, y));
  });
}

template <Adds kAdds>
ACF_INLINE void finish_row_of(const RowFinishCall& finish) {
  return finish.call->clamps ? finish_row_of<true, kAdds>(finish) : finish_row_of<false, kAdds>(finish);
}

inline void finish_row(const RowFinishCall& finish) {
  if (finish.residual == nullptr) return finish_row_of<Adds::nothing>(finish);
  return finish.rounding != nullptr ? finish_row_of<Adds::rounded>(finish) : finish_row_of<Adds::residual>(finish);
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
