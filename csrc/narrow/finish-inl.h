// What makes the sums of a tile results: included after conv/finish-inl.h.

using conv::Call;

// value(f, v): register v of filter f, before residual and activation.
template <bool kClamps, class Value>
ACF_INLINE void store_tile(const FinishCall& finish, const Value& value) {
  const Call& call = *finish.call;
  for (int v = 0; v < kTile / N::kLanes; ++v) {
    const Segment* first = call.tile->segments + call.tile->first[v];
    const Segment* last = call.tile->segments + call.tile->first[v + 1];
    if (first == last) continue;
    const auto mask = N::mask(first->from, first->to);
    float* out = call.out + first->out;
    const float* residual = call.residual == nullptr ? nullptr : call.residual + first->residual;
    for (int f = 0; f < finish.filters; ++f, out += call.out_plane) {
      Reg sum = value(f, v);
      if (residual != nullptr) {
        sum = N::add(sum, N::load_masked(residual, mask));
        for (const Segment* s = first + 1; s != last; ++s) {
          sum = N::add(sum, N::load_masked(residual + (s->residual - first->residual), N::mask(s->from, s->to)));
        }
        residual += call.residual_plane;
      }
      sum = kClamps ? clamp(sum, call.low, call.high) : activate(call, sum);
      N::store_masked(out, mask, sum);
      for (const Segment* s = first + 1; s != last; ++s) {
        N::store_masked(out + (s->out - first->out), N::mask(s->from, s->to), sum);
      }
    }
  }
}

template <class Value>
ACF_INLINE void finish_tile(const FinishCall& finish, const Value& value) {
  if (finish.call->clamps) {
    store_tile<true>(finish, value);
  } else {
    store_tile<false>(finish, value);
  }
}

inline void finish_bfloat16(const FinishCall& call) {
  const auto* sums = static_cast<const float*>(call.sums);
  finish_tile(call, [&](int f, int v) {
    return N::add(N::load(sums + f * kTile + v * N::kLanes), N::broadcast(call.bias + f));
  });
}

inline void finish_int8(const FinishCall& call) {
  const auto* sums = static_cast<const std::int32_t*>(call.sums);
  finish_tile(call, [&](int f, int v) {
    const Reg sum = N::difference(sums + f * kTile + v * N::kLanes, call.corrections[f]);
    return N::add(N::mul(sum, N::broadcast(call.multipliers + f)), N::broadcast(call.bias + f));
  });
}
