// Winograd's F(4x4, 3x3) with the points 0, +-a, +-b and infinity, for a = 1/sqrt(2) and b = sqrt(2), whose rounding
// errors are about half of those of the usual 0, +-1, +-2 and infinity:
//
//   output tile = A^T ((G g G^T) * (B^T d B)) A        d: 6x6 inputs, g: 3x3 weights, *: element by element
//
//        | 1    0  -5/2    0    1  0 |           | 1  1     1     1     1    0 |
//        | 0  -2a   -2     a    1  0 |           | 0  a    -a     b    -b    0 |
//  B^T = | 0   2a   -2    -a    1  0 |     A^T = | 0  1/2   1/2   2     2    0 |
//        | 0  -b/2  -1/2   b    1  0 |           | 0  a/2  -a/2   2b   -2b   1 |
//        | 0   b/2  -1/2  -b    1  0 |
//        | 0    1    0   -5/2   0  1 |
//
// and rows of G (winograd.cpp) are (1, p, p^2) divided by the product of the differences from p to the other points.
//
// Included, as text, by kernels-inl.h inside the anonymous namespace of one ISA.

inline constexpr float kPointA = 0.70710678118654752f, kPointB = 1.41421356237309505f;

// B^T d for a row or column d.
ACF_INLINE void transform_input(const Reg (&d)[6], Reg (&v)[6]) {
  const Reg minus_two = N::set(-2.0f), minus_half = N::set(-0.5f), rest = N::set(-2.5f);
  const Reg a = N::set(kPointA), b = N::set(kPointB);
  v[0] = N::add(N::fma(rest, d[2], d[4]), d[0]);
  const Reg even_a = N::fma(minus_two, d[2], d[4]), odd_a = N::mul(a, N::fma(minus_two, d[1], d[3]));
  v[1] = N::add(even_a, odd_a);
  v[2] = N::sub(even_a, odd_a);
  const Reg even_b = N::fma(minus_half, d[2], d[4]), odd_b = N::mul(b, N::fma(minus_half, d[1], d[3]));
  v[3] = N::add(even_b, odd_b);
  v[4] = N::sub(even_b, odd_b);
  v[5] = N::add(N::fma(rest, d[3], d[1]), d[5]);
}

// A^T m.
ACF_INLINE void transform_output(const Reg (&m)[6], Reg (&y)[4]) {
  const Reg sum_a = N::add(m[1], m[2]), sum_b = N::add(m[3], m[4]);
  const Reg odd_a = N::mul(N::set(kPointA), N::sub(m[1], m[2])), odd_b = N::mul(N::set(kPointB), N::sub(m[3], m[4]));
  const Reg half = N::set(0.5f), two = N::set(2.0f);
  y[0] = N::add(N::add(m[0], sum_a), sum_b);
  y[1] = N::add(odd_a, odd_b);
  y[2] = N::fma(half, sum_a, N::mul(two, sum_b));
  y[3] = N::add(N::fma(half, odd_a, N::mul(two, odd_b)), m[5]);
}

// A^T m of all 6 columns of products that lie `pitch` apart.
ACF_INLINE void transform_columns(const float* m, std::int64_t pitch, Reg (&rows)[4][6]) {
  unrolled<6>([&](auto j) {
    Reg column[6], y[4];
    unrolled<6>([&](auto i) { column[i] = N::load(m + (i * 6 + j) * pitch); });
    transform_output(column, y);
    unrolled<4>([&](auto i) { rows[i][j] = y[i]; });
  });
}

// How many of `lanes` are left after `skipped` ones of `columns`.
ACF_INLINE int lanes_left(int columns, int skipped, int lanes) {
  const int left = columns - skipped;
  return left < 0 ? 0 : left < lanes ? left : lanes;
}

// kPieces equal parts of a register, each from or to a place of its own.
template <int kPieces, class Mask, class Ops = N>
ACF_INLINE Reg load_parts(const float* const (&p)[kPieces], const Mask (&m)[kPieces]) {
  if constexpr (kPieces == 1) {
    return Ops::load_masked(p[0], m[0]);
  } else {
    return Ops::load_pieces(p, m);
  }
}
template <int kPieces, class Mask, class Ops = N>
ACF_INLINE void store_parts(float* const (&p)[kPieces], const Mask (&m)[kPieces], Reg r) {
  if constexpr (kPieces == 1) {
    Ops::store_masked(p[0], m[0], r);
  } else {
    Ops::store_pieces(p, m, r);
  }
}

// Inputs [shift, shift + the strip's width) of row r, of the strips that make up register i of a vector.
template <int kPieces, bool kWhole>
ACF_INLINE Reg load_strips(const WinogradInput& call, int i, int r, int shift, std::int64_t channel) {
  const std::int64_t at = channel + r * call.in_row + shift;
  const Strip* strips = call.strips + kPieces * i;
  if constexpr (kPieces == 1 && kWhole) return N::load(strips->in + at);
  if constexpr (kPieces == 2 && kWhole) return N::load_halves(strips[0].in + at, strips[1].in + at);
  constexpr int kWidth = N::kLanes / kPieces;
  const float* p[kPieces];
  decltype(N::mask(0, 0)) m[kPieces];
  unrolled<kPieces>([&](auto k) {
    const Strip& s = strips[k];
    p[k] = s.in + at;
    m[k] = N::mask(0, kWhole ? kWidth : r < s.in_rows ? lanes_left(s.in_columns, shift, kWidth) : 0);
  });
  return load_parts(p, m);
}

template <int kPieces, bool kWhole>
void winograd_input_of(const WinogradInput& call) {
  for (std::int64_t c = 0; c < call.count; ++c) {
    const std::int64_t channel = call.channels[c];
    Reg rows[6][6];
    unrolled<6>([&](auto r) {
      Reg near[4], far[4];
      unrolled<4>([&](auto i) {
        near[i] = load_strips<kPieces, kWhole>(call, i, r, 0, channel);
        far[i] = load_strips<kPieces, kWhole>(call, i, r, 4, channel);
      });
      N::transpose_quads(near);
      N::transpose_quads(far);
      const Reg d[6] = {near[0], near[1], near[2], near[3], far[0], far[1]};
      transform_input(d, rows[r]);
    });
    float* v = call.v + c * call.v_channel;
    unrolled<6>([&](auto j) {
      const Reg d[6] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j], rows[4][j], rows[5][j]};
      Reg column[6];
      transform_input(d, column);
      unrolled<6>([&](auto i) { N::store(v + (i * 6 + j) * call.v_element, column[i]); });
    });
  }
}

// Weights may stream from the third-level cache or from memory.
inline constexpr int kProductAhead = 1024;  // floats

template <int kFilters, int kVectors>
void winograd_product(const WinogradProduct& product) {
  Reg sum[kFilters][kVectors];
  unrolled<kFilters>([&](auto f) { unrolled<kVectors>([&](auto j) { sum[f][j] = N::set(0.0f); }); });
  const float *v = product.v, *w = product.weights, *end = w + product.channels * kFilters;
  const std::int64_t v_channel = product.v_channel;
#pragma GCC unroll 2
  for (; w != end; w += kFilters, v += v_channel) {
    __builtin_prefetch(w + kProductAhead);
    Reg tiles[kVectors];
    unrolled<kVectors>([&](auto j) { tiles[j] = N::load(v + j * N::kLanes); });
    unrolled<kFilters>([&](auto f) {
      const Reg weight = N::broadcast(w + f);
      unrolled<kVectors>([&](auto j) { sum[f][j] = N::fma(weight, tiles[j], sum[f][j]); });
    });
  }
  float* m = product.m;
  unrolled<kFilters>([&](auto f) {
    unrolled<kVectors>([&](auto j) { N::store(m + j * N::kLanes, sum[f][j]); });
    m += product.m_filter;
  });
}

// Adds the residual to the parts of a register, activates and stores them; offsets are those of the parts.
template <int kPieces, class Mask>
ACF_INLINE void finish_parts(const WinogradOutput& call, const std::int64_t (&out)[kPieces],
                             const std::int64_t (&residual)[kPieces], const Mask (&m)[kPieces], Reg sum) {
  if (call.residual != nullptr) {
    const float* from[kPieces];
    unrolled<kPieces>([&](auto k) { from[k] = call.residual + residual[k]; });
    sum = N::add(sum, load_parts(from, m));
  }
  float* to[kPieces];
  unrolled<kPieces>([&](auto k) { to[k] = call.out + out[k]; });
  store_parts(to, m, activate(*call.call, sum));
}

// Output row y of the strips that make up register i of a vector.
template <int kPieces, bool kWhole>
ACF_INLINE void store_strips(const WinogradOutput& call, int i, int y, std::int64_t f, Reg sum) {
  const std::int64_t out_row = f * call.out_plane + y * call.out_row;
  const std::int64_t residual_row = f * call.residual_plane + y * call.residual_row;
  const Strip* strips = call.strips + kPieces * i;
  if constexpr (kPieces == 1 && kWhole) {
    if (call.residual != nullptr) sum = N::add(sum, N::load(call.residual + strips->residual + residual_row));
    N::store(call.out + strips->out + out_row, activate(*call.call, sum));
  } else {
    std::int64_t out[kPieces], residual[kPieces];
    decltype(N::mask(0, 0)) m[kPieces];
    unrolled<kPieces>([&](auto k) {
      const Strip& s = strips[k];
      out[k] = s.out + out_row;
      residual[k] = s.residual + residual_row;
      m[k] = N::mask(0, y < s.out_rows ? s.out_columns : 0);
    });
    finish_parts(call, out, residual, m, sum);
  }
}

template <int kPieces, bool kWhole>
void winograd_output_of(const WinogradOutput& call) {
  for (std::int64_t f = 0; f < call.filters; ++f) {
    const float* m = call.m + f * call.m_filter;
    Reg rows[4][6];
    transform_columns(m, call.m_element, rows);
    const Reg bias = N::broadcast(call.bias + f);
    unrolled<4>([&](auto row) {
      Reg y[4];
      transform_output(rows[row], y);
      N::transpose_quads(y);
      unrolled<4>([&](auto i) { store_strips<kPieces, kWhole>(call, i, row, f, N::add(y[i], bias)); });
    });
  }
}

template <int kPieces>
void winograd_input_in(const WinogradInput& call) {
  return call.whole ? winograd_input_of<kPieces, true>(call) : winograd_input_of<kPieces, false>(call);
}

inline void winograd_input(const WinogradInput& call) {
  if constexpr (N::kMaxPieces >= 4) {
    if (call.pieces == 4) return winograd_input_in<4>(call);
  }
  if constexpr (N::kMaxPieces >= 2) {
    if (call.pieces == 2) return winograd_input_in<2>(call);
  }
  return winograd_input_in<1>(call);
}

inline void winograd_output(const WinogradOutput& call) {
  if constexpr (N::kMaxPieces >= 4) {
    if (call.pieces == 4) return winograd_output_of<4, false>(call);
  }
  if constexpr (N::kMaxPieces >= 2) {
    if (call.pieces == 2) return winograd_output_of<2, false>(call);
  }
  return call.whole ? winograd_output_of<1, true>(call) : winograd_output_of<1, false>(call);
}

// ---- few tiles: filters in lanes ------------------------------------------------------------------------------------

template <int kTiles, int kBlocks>
void winograd_few_product(const WinogradFewProduct& product) {
  constexpr int kVectors = kBlocks * kBlock / N::kLanes;
  Reg sum[kTiles][kVectors];
  unrolled<kTiles>([&](auto t) { unrolled<kVectors>([&](auto j) { sum[t][j] = N::set(0.0f); }); });
  const float* tiles[kTiles];
  unrolled<kTiles>([&](auto t) { tiles[t] = product.tiles[t]; });
  const float* w = product.weights;
  const std::int64_t end = product.channels * product.v_channel;
  for (std::int64_t at = 0; at != end; at += product.v_channel, w += kBlocks * kBlock) {
    unrolled<kBlocks>([&](auto b) { __builtin_prefetch(w + kProductAhead + b * kBlock); });
    Reg weights[kVectors];
    unrolled<kVectors>([&](auto j) { weights[j] = N::load(w + j * N::kLanes); });
    unrolled<kTiles>([&](auto t) {
      const Reg tile = N::broadcast(tiles[t] + at);
      unrolled<kVectors>([&](auto j) { sum[t][j] = N::fma(weights[j], tile, sum[t][j]); });
    });
  }
  unrolled<kTiles>([&](auto t) {
    unrolled<kVectors>([&](auto j) { N::store(product.m + t * product.m_tile + j * N::kLanes, sum[t][j]); });
  });
}

inline void winograd_few_output(const WinogradOutput& call) {
  constexpr int kPieces = N::kLanes / 4;  // a piece for each filter: the row of a tile
  for (std::int64_t t = 0; t < call.tiles; ++t) {
    const Strip& strip = call.strips[t];
    for (std::int64_t f = 0; f < call.filters; f += N::kLanes) {
      const float* m = call.m + t * call.m_tile + f;
      Reg rows[4][6];
      transform_columns(m, call.m_element, rows);
      const Reg bias = N::load(call.bias + f);
      unrolled<4>([&](auto row) {
        if (row >= strip.out_rows) return;
        Reg y[4];
        transform_output(rows[row], y);
        unrolled<4>([&](auto i) { y[i] = N::add(y[i], bias); });
        N::transpose_quads(y);
        unrolled<4>([&](auto i) {
          std::int64_t out[kPieces], residual[kPieces];
          decltype(N::mask(0, 0)) masks[kPieces];
          unrolled<kPieces>([&](auto k) {
            const std::int64_t filter = f + 4 * k + i;
            out[k] = strip.out + filter * call.out_plane + row * call.out_row;
            residual[k] = strip.residual + filter * call.residual_plane + row * call.residual_row;
            masks[k] = N::mask(0, filter < call.filters ? strip.out_columns : 0);
          });
          finish_parts(call, out, residual, masks, y[i]);
        });
      });
    }
  }
}
