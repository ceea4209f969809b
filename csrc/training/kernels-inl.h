// The kernels, in terms of N (a register of kLanes floats) and kSums, what a tile of sums may take of the registers.
// Included, as text, inside the anonymous namespace of one ISA.

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
  for (std::int64_t range = 0; range < call.count; ++range) {
    const std::int64_t begin = call.ranges[range].begin, end = call.ranges[range].end;
    const float* weights = call.weights + begin * rows;
    for (std::int64_t i = begin; i < end; ++i, weights += rows) {
      const float* const from = call.x + (call.origin + call.offsets[i]);
      Reg values[vectors];
      unrolled<vectors>([&](auto v) { values[v] = N::load(from + v * N::kLanes); });
      unrolled<rows>([&](auto t) {
        const Reg weight = N::set(weights[t]);
        unrolled<vectors>([&](auto v) { sums[t][v] = N::fma(weight, values[v], sums[t][v]); });
      });
    }
  }
  unrolled<rows>([&](auto t) {
    float* const to = call.out + call.to[t];
    unrolled<vectors>([&](auto v) {
      const Reg sum = call.adds ? N::add(N::load(to + v * N::kLanes), sums[t][v]) : sums[t][v];
      N::store(to + v * N::kLanes, sum);
    });
  });
}

// One vector of filters leaves room for the gradients of four images: an offset is read once for all.
constexpr int images_at_once(int vectors) { return vectors == 1 ? 4 : 1; }
constexpr int most_outer(int vectors) {
  const int rows = (kSums - vectors * (images_at_once(vectors) - 1)) / vectors;
  return rows < kMaxOuterRows ? rows : kMaxOuterRows;
}

template <int rows, int vectors>
void outer(const Outer& call) {
  constexpr int at_once = images_at_once(vectors), width = vectors * N::kLanes;
  Reg sums[rows][vectors];
  unrolled<rows>(
      [&](auto t) { unrolled<vectors>([&](auto v) { sums[t][v] = N::load(call.sums + t * width + v * N::kLanes); }); });
  const float *x = call.x + call.origin, *gradients = call.gradients;
  for (std::int64_t image = 0; image < call.images; image += at_once, x += at_once, gradients += at_once * width) {
    Reg of[at_once][vectors];
    unrolled<at_once>(
        [&](auto i) { unrolled<vectors>([&](auto v) { of[i][v] = N::load(gradients + i * width + v * N::kLanes); }); });
    unrolled<rows>([&](auto t) {
      const float* const from = x + call.offsets[t];
      unrolled<at_once>([&](auto i) {
        const Reg value = N::set(from[i]);
        unrolled<vectors>([&](auto v) { sums[t][v] = N::fma(value, of[i][v], sums[t][v]); });
      });
    });
  }
  unrolled<rows>(
      [&](auto t) { unrolled<vectors>([&](auto v) { N::store(call.sums + t * width + v * N::kLanes, sums[t][v]); }); });
}

inline void turn(const Turn& call) {
  for (int first = 0; first < call.width; first += N::kLanes) {
    for (std::int64_t image = 0; image < call.images; image += N::kLanes) {
      Reg rows[N::kLanes];
      unrolled<N::kLanes>([&](auto i) {
        const int filter = first + i;
        rows[i] = filter < call.filters ? N::load(call.from + call.offsets[filter] + image) : N::set(0.0F);
      });
      N::transpose(rows);
      unrolled<N::kLanes>([&](auto i) { N::store(call.to + (image + i) * call.width + first, rows[i]); });
    }
  }
}

// The run of every channel of every pixel: body(channel, where it begins).
template <class Body>
ACF_INLINE void each_run(const Pixels& of, const Body& body) {
  std::int64_t at = 0;
  for (std::int64_t pixel = 0; pixel < of.pixels; ++pixel) {
    for (std::int64_t channel = 0; channel < of.channels; ++channel, at += of.images) body(channel, at);
  }
}

// The vectors of a run: body(place in the run, number of a sum of two), and some(place, how many) for what is left.
template <class Body, class Some>
ACF_INLINE void each_vector(std::int64_t images, const Body& body, const Some& some) {
  std::int64_t at = 0;
  for (; at + 2 * N::kLanes <= images; at += 2 * N::kLanes) {
    body(at, Constant<0>{});
    body(at + N::kLanes, Constant<1>{});
  }
  for (; at + N::kLanes <= images; at += N::kLanes) body(at, Constant<0>{});
  if (at < images) some(at, static_cast<int>(images - at));
}

// `number` sums of every channel, each a vector in memory: body(channel, where its run begins, the sums to add to, two
// registers of each).
template <int number, class Body>
ACF_INLINE void summed(const Pixels& of, float* memory, const Body& body) {
  for (std::int64_t i = 0; i < of.channels * number * N::kLanes; ++i) memory[i] = 0.0F;
  each_run(of, [&](std::int64_t channel, std::int64_t at) {
    Reg sums[number][2];
    float* const kept = memory + channel * number * N::kLanes;
    unrolled<number>([&](auto i) {
      sums[i][0] = N::load(kept + i * N::kLanes);
      sums[i][1] = N::set(0.0F);
    });
    body(channel, at, sums);
    unrolled<number>([&](auto i) { N::store(kept + i * N::kLanes, N::add(sums[i][0], sums[i][1])); });
  });
}

// The `i`-th of `number` sums that `summed` left for a channel.
template <int number>
float total(const float* memory, std::int64_t channel, int i) {
  return N::total(N::load(memory + (channel * number + i) * N::kLanes));
}

inline void sums(const Pixels& of, const float* x, float* memory, float* out) {
  summed<1>(of, memory, [&](std::int64_t, std::int64_t run, Reg(&sum)[1][2]) {
    each_vector(
        of.images, [&](std::int64_t at, auto i) { sum[0][i] = N::add(sum[0][i], N::load(x + run + at)); },
        [&](std::int64_t at, int left) { sum[0][1] = N::add(sum[0][1], N::load_some(x + run + at, left)); });
  });
  for (std::int64_t c = 0; c < of.channels; ++c) out[c] = total<1>(memory, c, 0);
}

// x - middle, zero beyond the first `left`.
inline Reg some_differences(const float* x, float middle, int left) {
  float middles[N::kLanes];
  N::store(middles, N::set(-middle));
  return N::add(N::load_some(x, left), N::load_some(middles, left));
}

inline void squares(const Pixels& of, const float* x, const float* middle, float* memory, float* out) {
  summed<1>(of, memory, [&](std::int64_t channel, std::int64_t run, Reg(&sum)[1][2]) {
    const Reg minus = N::set(-middle[channel]);
    each_vector(
        of.images,
        [&](std::int64_t at, auto i) {
          const Reg difference = N::add(N::load(x + run + at), minus);
          sum[0][i] = N::fma(difference, difference, sum[0][i]);
        },
        [&](std::int64_t at, int left) {
          const Reg difference = some_differences(x + run + at, middle[channel], left);
          sum[0][1] = N::fma(difference, difference, sum[0][1]);
        });
  });
  for (std::int64_t c = 0; c < of.channels; ++c) out[c] = total<1>(memory, c, 0);
}

inline void products(const Pixels& of, const float* x, const float* g, const float* middle, float* memory, float* plain,
                     float* times) {
  summed<2>(of, memory, [&](std::int64_t channel, std::int64_t run, Reg(&sum)[2][2]) {
    const Reg minus = N::set(-middle[channel]);
    each_vector(
        of.images,
        [&](std::int64_t at, auto i) {
          const Reg gradient = N::load(g + run + at);
          sum[0][i] = N::add(sum[0][i], gradient);
          sum[1][i] = N::fma(gradient, N::add(N::load(x + run + at), minus), sum[1][i]);
        },
        [&](std::int64_t at, int left) {
          const Reg gradient = N::load_some(g + run + at, left);
          sum[0][1] = N::add(sum[0][1], gradient);
          sum[1][1] = N::fma(gradient, some_differences(x + run + at, middle[channel], left), sum[1][1]);
        });
  });
  for (std::int64_t c = 0; c < of.channels; ++c) plain[c] = total<2>(memory, c, 0);
  for (std::int64_t c = 0; c < of.channels; ++c) times[c] = total<2>(memory, c, 1);
}

inline void scaled(const Pixels& of, const float* x, const float* a, const float* b, float* out) {
  each_run(of, [&](std::int64_t channel, std::int64_t run) {
    const Reg slope = N::set(a[channel]), start = N::set(b[channel]);
    each_vector(
        of.images,
        [&](std::int64_t at, auto /*sum*/) { N::store(out + run + at, N::fma(N::load(x + run + at), slope, start)); },
        [&](std::int64_t at, int left) {
          N::store_some(out + run + at, N::fma(N::load_some(x + run + at, left), slope, start), left);
        });
  });
}

inline void combined(const Pixels& of, const float* x, const float* g, const float* a, const float* b, const float* c,
                     float* out) {
  each_run(of, [&](std::int64_t channel, std::int64_t run) {
    const Reg of_g = N::set(a[channel]), of_x = N::set(b[channel]), start = N::set(c[channel]);
    const auto value = [&](Reg from_x, Reg from_g) { return N::fma(from_g, of_g, N::fma(from_x, of_x, start)); };
    each_vector(
        of.images,
        [&](std::int64_t at, auto /*sum*/) {
          N::store(out + run + at, value(N::load(x + run + at), N::load(g + run + at)));
        },
        [&](std::int64_t at, int left) {
          N::store_some(out + run + at, value(N::load_some(x + run + at, left), N::load_some(g + run + at, left)),
                        left);
        });
  });
}

// Plain loops, which compilers turn into vectors.
inline constexpr int kRun = 64;

inline void maximum(const Maximum& call) {
  for (std::int64_t from = 0; from < call.values; from += kRun) {
    const int values = static_cast<int>(call.values - from < kRun ? call.values - from : kRun);
    float largest[kRun];
    std::int32_t at[kRun];
    for (int i = 0; i < values; ++i) {
      largest[i] = call.taps[0][from + i];
      at[i] = call.numbers[0];
    }
    for (int tap = 1; tap < call.count; ++tap) {
      const float* const of_tap = call.taps[tap] + from;
      const std::int32_t number = call.numbers[tap];
      for (int i = 0; i < values; ++i) {
        const float value = of_tap[i];
        const bool larger = (value > largest[i]) | (value != value);
        largest[i] = larger ? value : largest[i];
        at[i] = larger ? number : at[i];
      }
    }
    for (int i = 0; i < values; ++i) call.out[from + i] = largest[i];
    for (int i = 0; i < values; ++i) call.at[from + i] = static_cast<std::uint8_t>(at[i]);
  }
}

inline void scattered(const Scattered& call) {
  for (std::int64_t i = 0; i < call.values; ++i) call.to[i] = 0.0F;
  for (int window = 0; window < call.count; ++window) {
    const float* const gradients = call.gradients[window];
    const std::uint8_t *const at = call.at[window], number = call.numbers[window];
    float* const to = call.to;
    for (std::int64_t i = 0; i < call.values; ++i) to[i] += at[i] == number ? gradients[i] : 0.0F;
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
template <int rows, int vectors>
constexpr OuterKernel outer_or_none() {
  if constexpr (rows <= most_outer(vectors)) {
    return outer<rows, vectors>;
  } else {
    return nullptr;
  }
}

template <int... row, int... outer_row>
constexpr Kernels table_of(Indices<row...> /*rows*/, Indices<outer_row...> /*rows of outer products*/) {
  return {N::kLanes,
          {most_rows(kVectors[0]), most_rows(kVectors[1])},
          {{product_or_none<row + 1, kVectors[0]>()...}, {product_or_none<row + 1, kVectors[1]>()...}},
          {most_outer(1), most_outer(2)},
          {{outer_or_none<outer_row + 1, 1>()...}, {outer_or_none<outer_row + 1, 2>()...}},
          turn,
          sums,
          squares,
          products,
          scaled,
          combined,
          maximum,
          scattered};
}
