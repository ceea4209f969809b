// Gathering tiles of pixels with AVX-512. Both kernels read one register of pixels for every column.

// Pixels of a column, in 1 to 4 stretches side by side in memory; lanes that none fills are zeros.
template <int kStretches>
struct Side {
  std::int64_t at[kStretches];
  __mmask16 mask[kStretches];

  explicit Side(const Reads& reads) {
    unrolled<kStretches>([&](auto i) {
      const Stretch& s = reads.stretch[i];
      at[i] = s.at;
      mask[i] = static_cast<__mmask16>((1u << s.to) - (1u << s.from));
    });
  }
  ACF_INLINE __m512 load(const float* p) const {
    __m512 r = _mm512_maskz_loadu_ps(mask[0], p + at[0]);
    unrolled<kStretches - 1>([&](auto i) { r = _mm512_mask_loadu_ps(r, mask[i + 1], p + at[i + 1]); });
    return r;
  }
};

// The same for a step of 2: of two registers the even lanes.
template <int kStretches>
struct Even {
  std::int64_t at[kStretches];
  __mmask16 low[kStretches], high[kStretches], mask[kStretches];

  explicit Even(const Reads& reads) {
    unrolled<kStretches>([&](auto i) {
      const Stretch& s = reads.stretch[i];
      at[i] = s.at;
      mask[i] = static_cast<__mmask16>((1u << s.to) - (1u << s.from));
      const std::uint32_t lanes = spread(mask[i]);
      low[i] = static_cast<__mmask16>(lanes);
      high[i] = static_cast<__mmask16>(lanes >> 16);
    });
  }
  ACF_INLINE __m512 load(const float* p) const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512 r = _mm512_setzero_ps();
    unrolled<kStretches>([&](auto i) {
      const float* from = p + at[i];
      r = _mm512_mask_mov_ps(
          r, mask[i],
          _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(low[i], from), even, _mm512_maskz_loadu_ps(high[i], from + 16)));
    });
    return r;
  }

 private:
  // Bit i to bit 2 i.
  static std::uint32_t spread(std::uint32_t x) {
    x = (x | (x << 8)) & 0x00ff00ffu;
    x = (x | (x << 4)) & 0x0f0f0f0fu;
    x = (x | (x << 2)) & 0x33333333u;
    return (x | (x << 1)) & 0x55555555u;
  }
};

// Pixels anywhere.
struct Apart {
  __m512i lanes;
  __mmask16 mask;

  explicit Apart(const Reads& reads)
      : lanes(_mm512_loadu_si512(reads.lanes)), mask(static_cast<__mmask16>((1u << reads.count) - 1)) {}
  ACF_INLINE __m512 load(const float* p) const {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, lanes, p, sizeof(float));
  }
};

// body(pixels) with whichever fits.
template <class Body>
ACF_INLINE void with_pixels(const Reads& reads, const Body& body) {
  if (reads.step == 1 || reads.count == 1) {
    switch (reads.stretches) {
      case 1: return body(Side<1>(reads));
      case 2: return body(Side<2>(reads));
      case 3: return body(Side<3>(reads));
      case 4: return body(Side<4>(reads));
      default: return body(Apart(reads));
    }
  }
  if (reads.step == 2) {
    switch (reads.stretches) {
      case 1: return body(Even<1>(reads));
      case 2: return body(Even<2>(reads));
      default: return body(Apart(reads));
    }
  }
  return body(Apart(reads));
}

// To 0..255, in the low bytes.
struct Quantize {
  __m512 inverse, most;
  __m512i zero;

  explicit Quantize(const GatherCall& call)
      : inverse(_mm512_set1_ps(call.inverse)), most(_mm512_set1_ps(65536.0f)), zero(_mm512_set1_epi32(call.zero)) {}
  ACF_INLINE __m512i integers(__m512 x) const {
    const __m512 scaled = _mm512_maskz_min_ps(0xffff, _mm512_mul_ps(x, inverse), most);
    return _mm512_add_epi32(_mm512_maskz_cvtps_epi32(0xffff, scaled), zero);
  }
  ACF_INLINE __m512i row(const __m512 (&x)[4]) const {
    // Every quarter of a register: 4 pixels of columns 0 and 1, of 2 and 3, then of all, which are brought together.
    const __m512i ab = _mm512_packs_epi32(integers(x[0]), integers(x[1])),
                  cd = _mm512_packs_epi32(integers(x[2]), integers(x[3]));
    const __m512i together =
        _mm512_maskz_broadcast_i32x4(0xffff, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_packus_epi16(ab, cd), together);
  }
};

inline void gather_int8(const GatherCall& call) {
  const Quantize quantize(call);
  with_pixels(*call.reads, [&](const auto& pixels) {
    const std::int32_t* offset = call.offsets;
    unsigned char* to = call.to;
    std::int64_t left = call.columns;
    for (; left >= 4; left -= 4, offset += 4, to += kRowBytes) {
      const __m512 x[4] = {pixels.load(call.in + offset[0]), pixels.load(call.in + offset[1]),
                           pixels.load(call.in + offset[2]), pixels.load(call.in + offset[3])};
      __builtin_prefetch(call.in + offset[0] + call.ahead);
      __builtin_prefetch(call.in + offset[2] + call.ahead);
      _mm512_store_si512(to, quantize.row(x));
    }
    if (left == 0) return;
    __m512 x[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::int64_t i = 0; i < left; ++i) x[i] = pixels.load(call.in + offset[i]);
    _mm512_store_si512(to, quantize.row(x));
  });
}

inline void copy_rows(const CopyCall& call) {
  with_pixels(*call.reads, [&](const auto& pixels) {
    unsigned char* to = call.to;
    for (std::int64_t row = 0; row < call.rows; ++row, to += kRowBytes) {
      _mm512_store_ps(to, pixels.load(call.in + call.offsets[row]));
    }
  });
}

#ifdef __AVX512BF16__

// Pairs of two columns, pixel by pixel.
ACF_INLINE __m512i pairs(__m512 first, __m512 second) {
  // In words: pixel i of the first column from i, of the second from 16 + i.
  const __m512i apart = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(apart, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

inline void gather_bfloat16(const GatherCall& call) {
  with_pixels(*call.reads, [&](const auto& pixels) {
    const std::int32_t* offset = call.offsets;
    unsigned char* to = call.to;
    for (std::int64_t left = call.columns; left > 0; left -= 2, offset += 2, to += kRowBytes) {
      const __m512 first = pixels.load(call.in + offset[0]),
                   second = left > 1 ? pixels.load(call.in + offset[1]) : _mm512_setzero_ps();
      __builtin_prefetch(call.in + offset[0] + call.ahead);
      _mm512_store_si512(to, pairs(first, second));
    }
  });
}

#endif
