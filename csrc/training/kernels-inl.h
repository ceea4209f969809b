// The kernels, in terms of N (a register of kLanes floats) and what fits into the registers: kSums of a product, tiles
// of kDotsA x kDotsB. Included, as text, inside the anonymous namespace of one ISA.

#include "core/unrolled-inl.h"

using Reg = N::Reg;

constexpr int most_rows(int vectors) { return kSums / vectors < kMaxRows ? kSums / vectors : kMaxRows; }

template <int rows, int vectors>
void product(const Product& call) {
  Reg sums[rows][vectors];
  unrolled<rows>([&](auto t) {
    const Reg start = N::set(call.start == nullptr ? 0.0F : call.start[t]);
    unrolled<vectors>([&](auto v) { sums[t][v] = start; });
  });
  const float* weights = call.weights;
  for (std::int64_t i = 0; i < call.terms; ++i) {
    const float* const from = call.x + call.offsets[i];
    Reg values[vectors];
    unrolled<vectors>([&](auto v) { values[v] = N::load(from + v * N::kLanes); });
    unrolled<rows>([&](auto t) {
      const Reg weight = N::set(weights[t]);
      unrolled<vectors>([&](auto v) { sums[t][v] = N::fma(weight, values[v], sums[t][v]); });
    });
    weights += rows;
  }
  if (call.adds) {
    unrolled<rows>([&](auto t) {
      float* const to = call.out + call.to[t];
      unrolled<vectors>([&](auto v) { N::store(to + v * N::kLanes, N::add(N::load(to + v * N::kLanes), sums[t][v])); });
    });
  } else if (call.images == vectors * N::kLanes) {
    unrolled<rows>([&](auto t) {
      float* const to = call.out + call.to[t];
      unrolled<vectors>([&](auto v) { N::store(to + v * N::kLanes, sums[t][v]); });
    });
  } else {
    unrolled<rows>([&](auto t) {
      float* const to = call.out + call.to[t];
      unrolled<vectors>([&](auto v) {
        const int left = call.images - v * N::kLanes;
        if (left > 0) N::store_some(to + v * N::kLanes, sums[t][v], left < N::kLanes ? left : N::kLanes);
      });
    });
  }
}

template <int count_a, int count_b>
void dots(const Dots& call) {
  Reg sums[count_a][count_b];
  unrolled<count_a>([&](auto i) { unrolled<count_b>([&](auto j) { sums[i][j] = N::set(0.0F); }); });
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const float *a = call.a + row * call.a_row, *b = call.b + row * call.b_row;
    for (std::int64_t run = 0; run < call.runs; ++run) {
      unrolled<kVectors[0]>([&](auto v) {
        Reg of_a[count_a];
        unrolled<count_a>([&](auto i) { of_a[i] = N::load(a + call.from_a[i] + v * N::kLanes); });
        unrolled<count_b>([&](auto j) {
          const Reg of_b = N::load(b + call.from_b[j] + v * N::kLanes);
          unrolled<count_a>([&](auto i) { sums[i][j] = N::fma(of_a[i], of_b, sums[i][j]); });
        });
      });
      a += call.a_run;
      b += call.b_run;
    }
  }
  unrolled<count_a>(
      [&](auto i) { unrolled<count_b>([&](auto j) { call.sums[i * call.pitch + j] += N::total(sums[i][j]); }); });
}

template <int vectors, bool packs>
void move(const Move& call) {
  if (call.images == vectors * N::kLanes) {
    for (std::int64_t i = 0; i < call.pixels; ++i) {
      unrolled<vectors>([&](auto v) {
        N::store(call.to + i * call.to_step + v * N::kLanes, N::load(call.from + i * call.from_step + v * N::kLanes));
      });
    }
    return;
  }
  for (std::int64_t i = 0; i < call.pixels; ++i) {
    unrolled<vectors>([&](auto v) {
      const int left = call.images - v * N::kLanes, some = left < 0 ? 0 : left < N::kLanes ? left : N::kLanes;
      const float* const from = call.from + i * call.from_step + v * N::kLanes;
      float* const to = call.to + i * call.to_step + v * N::kLanes;
      if (packs) {
        N::store(to, some == 0 ? N::set(0.0F) : N::load_some(from, some));
      } else if (some > 0) {
        N::store_some(to, N::load(from), some);
      }
    });
  }
}

inline float sum(const float* from, std::int64_t count) {
  Reg sums[4] = {N::set(0.0F), N::set(0.0F), N::set(0.0F), N::set(0.0F)};
  std::int64_t at = 0;
  for (; at + 4 * N::kLanes <= count; at += 4 * N::kLanes) {
    unrolled<4>([&](auto i) { sums[i] = N::add(sums[i], N::load(from + at + i * N::kLanes)); });
  }
  for (; at + N::kLanes <= count; at += N::kLanes) sums[0] = N::add(sums[0], N::load(from + at));
  if (at < count) sums[1] = N::add(sums[1], N::load_some(from + at, static_cast<int>(count - at)));
  return N::total(N::add(N::add(sums[0], sums[1]), N::add(sums[2], sums[3])));
}

// body(at, i) for every whole vector of `count` values, with the number of the sum, of four, that it may add to.
template <class Body>
ACF_INLINE void each_vector(std::int64_t count, const Body& body) {
  std::int64_t at = 0;
  for (; at + 4 * N::kLanes <= count; at += 4 * N::kLanes) {
    unrolled<4>([&](auto i) { body(at + i * N::kLanes, i); });
  }
  for (; at + N::kLanes <= count; at += N::kLanes) body(at, Constant<0>{});
}

inline float squares(const float* x, std::int64_t count, float middle) {
  const Reg minus = N::set(-middle);
  Reg sums[4] = {N::set(0.0F), N::set(0.0F), N::set(0.0F), N::set(0.0F)};
  each_vector(count, [&](std::int64_t at, auto i) {
    const Reg difference = N::add(N::load(x + at), minus);
    sums[i] = N::fma(difference, difference, sums[i]);
  });
  float total = N::total(N::add(N::add(sums[0], sums[1]), N::add(sums[2], sums[3])));
  for (std::int64_t at = count / N::kLanes * N::kLanes; at < count; ++at) total += (x[at] - middle) * (x[at] - middle);
  return total;
}

inline void products(const float* x, const float* g, std::int64_t count, float middle, float (&sums)[2]) {
  const Reg minus = N::set(-middle);
  Reg plain[4] = {N::set(0.0F), N::set(0.0F), N::set(0.0F), N::set(0.0F)};
  Reg times[4] = {N::set(0.0F), N::set(0.0F), N::set(0.0F), N::set(0.0F)};
  each_vector(count, [&](std::int64_t at, auto i) {
    const Reg gradient = N::load(g + at);
    plain[i] = N::add(plain[i], gradient);
    times[i] = N::fma(gradient, N::add(N::load(x + at), minus), times[i]);
  });
  sums[0] = N::total(N::add(N::add(plain[0], plain[1]), N::add(plain[2], plain[3])));
  sums[1] = N::total(N::add(N::add(times[0], times[1]), N::add(times[2], times[3])));
  for (std::int64_t at = count / N::kLanes * N::kLanes; at < count; ++at) {
    sums[0] += g[at];
    sums[1] += g[at] * (x[at] - middle);
  }
}

inline void scaled(const float* x, std::int64_t count, float a, float b, float* out) {
  const Reg slope = N::set(a), start = N::set(b);
  each_vector(count, [&](std::int64_t at, auto /*sum*/) { N::store(out + at, N::fma(N::load(x + at), slope, start)); });
  for (std::int64_t at = count / N::kLanes * N::kLanes; at < count; ++at) out[at] = x[at] * a + b;
}

inline void combined(const float* x, const float* g, std::int64_t count, float a, float b, float c, float* out) {
  const Reg of_g = N::set(a), of_x = N::set(b), start = N::set(c);
  each_vector(count, [&](std::int64_t at, auto /*sum*/) {
    N::store(out + at, N::fma(N::load(g + at), of_g, N::fma(N::load(x + at), of_x, start)));
  });
  for (std::int64_t at = count / N::kLanes * N::kLanes; at < count; ++at) out[at] = g[at] * a + (x[at] * b + c);
}

// Plain loops, which compilers turn into vectors.
inline constexpr int kRun = 64;

inline void maximum(const Maximum& call) {
  for (std::int64_t from = 0; from < call.images; from += kRun) {
    const int images = static_cast<int>(call.images - from < kRun ? call.images - from : kRun);
    float largest[kRun];
    std::int32_t at[kRun];
    for (int i = 0; i < images; ++i) {
      largest[i] = call.taps[0][from + i];
      at[i] = call.numbers[0];
    }
    for (int tap = 1; tap < call.count; ++tap) {
      const float* const values = call.taps[tap] + from;
      const std::int32_t number = call.numbers[tap];
      for (int i = 0; i < images; ++i) {
        const float value = values[i];
        const bool larger = (value > largest[i]) | (value != value);
        largest[i] = larger ? value : largest[i];
        at[i] = larger ? number : at[i];
      }
    }
    for (int i = 0; i < images; ++i) call.out[from + i] = largest[i];
    for (int i = 0; i < images; ++i) call.at[from + i] = static_cast<std::uint8_t>(at[i]);
  }
}

inline void scattered(const Scattered& call) {
  for (std::int64_t i = 0; i < call.images; ++i) call.to[i] = 0.0F;
  for (int window = 0; window < call.count; ++window) {
    const float* const gradients = call.gradients[window];
    const std::uint8_t *const at = call.at[window], number = call.numbers[window];
    float* const to = call.to;
    for (std::int64_t i = 0; i < call.images; ++i) to[i] += at[i] == number ? gradients[i] : 0.0F;
  }
}

template <int rows, int vectors>
constexpr ProductKernel product_or_none() {
  if constexpr (rows <= most_rows(vectors)) {
    return product<rows, vectors>;
  } else {
    return nullptr;
  }
}
template <int a, int b>
constexpr DotsKernel dots_or_none() {
  if constexpr (a <= kDotsA && b <= kDotsB) {
    return dots<a, b>;
  } else {
    return nullptr;
  }
}

template <int... row, int... j>
constexpr Kernels table_of(Indices<row...> /*rows*/, Indices<j...> /*columns of dots*/) {
  return {N::kLanes,
          {most_rows(kVectors[0]), most_rows(kVectors[1])},
          {{product_or_none<row + 1, kVectors[0]>()...}, {product_or_none<row + 1, kVectors[1]>()...}},
          {move<kVectors[0], true>, move<kVectors[1], true>},
          {move<kVectors[0], false>, move<kVectors[1], false>},
          kDotsA,
          kDotsB,
          {{dots_or_none<1, j + 1>()...},
           {dots_or_none<2, j + 1>()...},
           {dots_or_none<3, j + 1>()...},
           {dots_or_none<4, j + 1>()...}},
          sum,
          squares,
          products,
          scaled,
          combined,
          maximum,
          scattered};
}
