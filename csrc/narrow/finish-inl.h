// What makes the sums of some tiles of pixels results: included after conv/finish-inl.h.

using conv::Call;

// value(f, sums): of filter f, of the register that lies there, before residual and activation. What many filters have
// in common is outside the loop over these, and the pixels of a filter are written side by side.
template <bool kClamps, bool kAdds, class Value>
ACF_INLINE void store_tiles(const FinishCall& finish, const Value& value) {
  const Call& call = *finish.call;
  const Reg low = N::set(call.low), high = N::set(call.high);
  typename N::Mask mask[kTogether * kMaxStores];
  for (int i = 0; i < finish.count; ++i) mask[i] = N::mask(finish.stores[i].from, finish.stores[i].to);
  for (int f = 0; f < finish.filters; ++f) {
    const auto of_filter = value(f);
    float* out = call.out + f * call.out_plane;
    const float* residual = kAdds ? call.residual + f * call.residual_plane : nullptr;
    for (int i = 0; i < finish.count; ++i) {
      const Store& store = finish.stores[i];
      Reg sum = of_filter(store.sums);
      if constexpr (kAdds) sum = N::add(sum, N::load_masked(residual + store.residual, mask[i]));
      N::store_masked(out + store.out, mask[i], kClamps ? N::min(high, N::max(low, sum)) : activate(call, sum));
    }
  }
}

template <class Value>
ACF_INLINE void finish_tiles(const FinishCall& finish, const Value& value) {
  const bool adds = finish.call->residual != nullptr;
  if (finish.call->clamps)
    return adds ? store_tiles<true, true>(finish, value) : store_tiles<true, false>(finish, value);
  return adds ? store_tiles<false, true>(finish, value) : store_tiles<false, false>(finish, value);
}

inline void finish_bfloat16(const FinishCall& call) {
  finish_tiles(call, [&](int f) {
    const float* sums = static_cast<const float*>(call.sums) + f * kTile;
    const Reg bias = N::broadcast(call.bias + f);
    return [=](std::int32_t at) { return N::add(N::load(sums + at), bias); };
  });
}

inline void finish_int8(const FinishCall& call) {
  finish_tiles(call, [&](int f) {
    const std::int32_t* sums = static_cast<const std::int32_t*>(call.sums) + f * kTile;
    const std::int32_t correction = call.corrections[f];
    const Reg multiplier = N::broadcast(call.multipliers + f), bias = N::broadcast(call.bias + f);
    return [=](std::int32_t at) { return N::add(N::mul(N::difference(sums + at, correction), multiplier), bias); };
  });
}
