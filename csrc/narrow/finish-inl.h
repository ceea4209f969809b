// What makes the sums of a tile results: included after conv/finish-inl.h.

using conv::Call;

// Residual, activation and stores, of all registers of every filter.
inline void store_tile(const FinishCall& call, const float* sums) {
  for (int v = 0; v < kTile / N::kLanes; ++v) finish(*call.call, v, call.filters, sums + v * N::kLanes, kTile);
}

inline void finish_bfloat16(const FinishCall& call) {
  auto* sums = static_cast<float*>(call.sums);
  for (int f = 0; f < call.filters; ++f) {
    for (int i = 0; i < kTile; ++i) sums[f * kTile + i] += call.bias[f];
  }
  store_tile(call, sums);
}

inline void finish_int8(const FinishCall& call) {
  const auto* sums = static_cast<const std::int32_t*>(call.sums);
  alignas(64) float results[kTile * kTile];
  for (int f = 0; f < call.filters; ++f) {
    for (int i = 0; i < kTile; ++i) {
      results[f * kTile + i] =
          static_cast<float>(sums[f * kTile + i] - call.corrections[f]) * call.multipliers[f] + call.bias[f];
    }
  }
  store_tile(call, results);
}
