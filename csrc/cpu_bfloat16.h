// The three kernels of cpu_kernels.h on AVX-512's bfloat16 dot product, for x and adapters that are both bfloat16: it
// multiplies pairs and adds them in float, twice the work of a float instruction and what ATen's own GEMMs there use.
//
// A pair runs along the index that is summed over: `dot` finds its pairs where they lie, `outer` interleaves two rows,
// `expand` has its ranks interleaved when they are packed. What eager rounds to bfloat16, S and dS, is rounded here.

typedef std::uint32_t Pair;  // two bfloat16, the first in the low half

inline Vec add_products(Vec sum, Bits a, Bits b) {
  return bits_of<Vec>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
}
inline Bits load_pairs(const void* p) {
  Bits b;
  std::memcpy(&b, p, sizeof b);
  return b;
}
inline Bits splat_pair(Pair pair) { return bits_of<Bits>(_mm512_set1_epi32(static_cast<int>(pair))); }
inline Pair paired(float low, float high) {
  return from_float<BFloat16>(low).bits | static_cast<Pair>(from_float<BFloat16>(high).bits) << 16;
}

inline void store_rounded(BFloat16* p, Vec v) {
  const auto rounded = _mm512_cvtneps_pbh(bits_of<__m512>(v));
  std::memcpy(p, &rounded, sizeof rounded);
}

struct BFloat16Engine {
  typedef BFloat16 Element;
  static constexpr int W = 2 * V;  // bfloat16 lanes of a register
  static std::int64_t whole(std::int64_t n) { return (n + W - 1) / W * W; }
  static std::int64_t packed(int R, std::int64_t width) { return ranks(R) * whole(width); }
  // Interleaving works within 128 bits: of each 32 columns, the first register has the first four of every eight.
  static std::int64_t position(std::int64_t j) { return j / W * W + j % 8 / 4 * V + j % W / 8 * 4 + j % 4; }

  template <typename P>
  static BFloat16 at(const P* from, int R, std::int64_t width, bool transposed, int r, std::int64_t j) {
    return r < R && j < width ? (transposed ? from[j * R + r] : from[r * width + j]) : BFloat16{0};
  }
  // p[r][j]
  static void pack_for_dot(BFloat16* p, const BFloat16* from, int R, std::int64_t width, bool transposed) {
    const std::int64_t padded = whole(width);
    for (std::int64_t j = 0; j < padded; ++j)
      for (int r = 0; r < ranks(R); ++r) p[r * padded + j] = at(from, R, width, transposed, r, j);
  }
  // p[r / 2][j][r % 2]
  static void pack_for_expand(BFloat16* p, const BFloat16* from, int R, std::int64_t width, bool transposed) {
    const std::int64_t padded = whole(width);
    for (std::int64_t j = 0; j < padded; ++j)
      for (int r = 0; r < ranks(R); ++r)
        p[(r / 2 * padded + j) * 2 + r % 2] = at(from, R, width, transposed, r, j);
  }

  static const BFloat16* block(const BFloat16* in, std::int64_t& stride, std::int64_t row, int rows, std::int64_t width,
                               const Dropout* dropout, BFloat16* scratch) {
    in += row * stride;
    const std::int64_t padded = whole(width), full = width / V * V;
    if (!dropout && padded == width) return in;
    for (int m = 0; m < rows; ++m) {
      const BFloat16* from = in + m * stride;
      BFloat16* to = scratch + m * padded;
      if (dropout) {
        const RowKey key(*dropout, row + m);
        std::int64_t j = 0;
        for (; j + W <= width; j += W) {
          const Bits hashed = hash(key, j);
          store_rounded(to + j, load(from + j) * kept(hashed, 0, *dropout));
          store_rounded(to + j + V, load(from + j + V) * kept(hashed, V, *dropout));
        }
        for (; j < full; j += V) store_rounded(to + j, load(from + j) * kept(key, j, *dropout));
        if (full < width) {
          const int left = static_cast<int>(width - full);
          store_some(to + full, load_some(from + full, left) * kept(key, full, *dropout), left);
        }
      } else {
        std::copy(from, from + width, to);
      }
      std::fill(to + width, to + padded, BFloat16{0});
    }
    stride = padded;
    return scratch;
  }

  template <int ROWS>
  static void dot_rows(float* c, const BFloat16* in, std::int64_t stride, const BFloat16* p, std::int64_t padded, int R,
                       float scaling) {
    for (int r = 0; r < R; r += DOT_RANKS) {
      Vec acc[ROWS][DOT_RANKS] = {};
      const BFloat16* q = p + r * padded;
      for (std::int64_t j = 0; j < padded; j += W) {
        Bits b[DOT_RANKS];
#pragma GCC unroll 8
        for (int i = 0; i < DOT_RANKS; ++i) b[i] = load_pairs(q + i * padded + j);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
          const Bits a = load_pairs(in + m * stride + j);
#pragma GCC unroll 8
          for (int i = 0; i < DOT_RANKS; ++i) acc[m][i] = add_products(acc[m][i], a, b[i]);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const Four total = sums(acc[m]) * scaling;
        for (int i = 0; i < DOT_RANKS && r + i < R; ++i) c[m * R + r + i] = total[i];
      }
    }
  }
  static void dot(float* c, const BFloat16* in, std::int64_t stride, int rows, const BFloat16* p, std::int64_t width,
                  int R, float scaling) {
    int m = 0;
    for (; m + DOT_ROWS <= rows; m += DOT_ROWS)
      dot_rows<DOT_ROWS>(c + m * R, in + m * stride, stride, p, whole(width), R, scaling);
    for (; m < rows; ++m) dot_rows<1>(c + m * R, in + m * stride, stride, p, whole(width), R, scaling);
  }

  template <int ROWS, int VECTORS>
  static void expand_tile(BFloat16* out, bool add, std::int64_t stride, std::int64_t j,
                          std::int64_t left, const Pair* c, const BFloat16* p, std::int64_t padded, int pairs, float scaling, const RowKey* keys,
                          const Dropout* dropout) {
    Vec acc[ROWS][VECTORS] = {};
    for (int r = 0; r < pairs; ++r) {
      Bits b[VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) b[i] = load_pairs(p + (r * padded + j + i * V) * 2);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const Bits a = splat_pair(c[m * pairs + r]);
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) acc[m][i] = add_products(acc[m][i], b[i], a);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Bits hashed = dropout ? hash(keys[m], j) : Bits{};
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) {
        Vec v = acc[m][i] * scaling;
        if (dropout) v *= kept(hashed, i * V, *dropout);
        BFloat16* to = out + m * stride + j + i * V;
        const std::int64_t here = left - i * V;
        if (here >= V) {
          store_rounded(to, add ? load(to) + v : v);
        } else if (here > 0) {
          const int some = static_cast<int>(here);
          store_some(to, add ? load_some(to, some) + v : v, some);
        }
      }
    }
  }
  template <int ROWS>
  static void expand_rows(BFloat16* out, bool add, std::int64_t stride, std::int64_t row,
                          std::int64_t width, const Pair* c, const BFloat16* p, int pairs, float scaling,
                          const Dropout* dropout) {
    RowKey keys[ROWS];
    if (dropout)
      for (int m = 0; m < ROWS; ++m) keys[m] = RowKey(*dropout, row + m);
    for (std::int64_t j = 0; j < width; j += W)
      expand_tile<ROWS, 2>(out, add, stride, j, width - j, c, p, whole(width), pairs, scaling, keys, dropout);
  }
  template <typename T>
  static void expand(T* out, bool add, std::int64_t stride, std::int64_t row, int rows,
                     std::int64_t width, const float* c, const BFloat16* p, int R, float scaling,
                     const Dropout* dropout) {
    const int pairs = (R + 1) / 2;
    Pair coefficients[EXPAND_ROWS * MAX_RANK / 2];
    for (int m = 0; m < rows; m += EXPAND_ROWS) {
      const int here = std::min(EXPAND_ROWS, rows - m);
      for (int i = 0; i < here; ++i)
        for (int r = 0; r < pairs; ++r) {
          const float* pair = c + (m + i) * R + 2 * r;
          coefficients[i * pairs + r] = paired(pair[0], 2 * r + 1 < R ? pair[1] : 0.0f);
        }
      if (here == EXPAND_ROWS) {
        expand_rows<EXPAND_ROWS>(out + m * stride, add, stride, row + m, width, coefficients, p, pairs, scaling,
                                 dropout);
      } else {
        for (int i = 0; i < here; ++i)
          expand_rows<1>(out + (m + i) * stride, add, stride, row + m + i, width, coefficients + i * pairs, p,
                         pairs, scaling, dropout);
      }
    }
  }

  template <int RANKS>
  static void outer_tile(float* acc, std::int64_t padded, const BFloat16* in, std::int64_t stride, int rows,
                         const Pair* c, int R) {
    Vec sum[RANKS][2];
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      sum[r][0] = load(acc + r * padded);
      sum[r][1] = load(acc + r * padded + V);
    }
    for (int m = 0; m < rows; m += 2) {
      const __m512i first = bits_of<__m512i>(load_pairs(in + m * stride));
      const __m512i second = m + 1 < rows ? bits_of<__m512i>(load_pairs(in + (m + 1) * stride)) : __m512i{};
      __builtin_prefetch(in + m * stride + W);
      __builtin_prefetch(in + (m + 1) * stride + W);
      const Bits low = bits_of<Bits>(_mm512_unpacklo_epi16(first, second));
      const Bits high = bits_of<Bits>(_mm512_unpackhi_epi16(first, second));
#pragma GCC unroll 8
      for (int r = 0; r < RANKS; ++r) {
        const Bits a = splat_pair(c[m / 2 * R + r]);
        sum[r][0] = add_products(sum[r][0], low, a);
        sum[r][1] = add_products(sum[r][1], high, a);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      store(acc + r * padded, sum[r][0]);
      store(acc + r * padded + V, sum[r][1]);
    }
  }
  static void outer(float* acc, std::int64_t width, const BFloat16* in, std::int64_t stride, int rows, const float* c,
                    int R) {
    const std::int64_t padded = whole(width);
    Pair pairs[BLOCK / 2 * MAX_RANK];
    for (int m = 0; m < rows; m += 2)
      for (int r = 0; r < R; ++r)
        pairs[m / 2 * R + r] = paired(c[m * R + r], m + 1 < rows ? c[(m + 1) * R + r] : 0.0f);
    for (std::int64_t j = 0; j < padded; j += W) {
      int r = 0;
      for (; r + OUTER_RANKS <= R; r += OUTER_RANKS)
        outer_tile<OUTER_RANKS>(acc + r * padded + j, padded, in + j, stride, rows, pairs + r, R);
      for (; r + 2 <= R; r += 2) outer_tile<2>(acc + r * padded + j, padded, in + j, stride, rows, pairs + r, R);
      if (r < R) outer_tile<1>(acc + r * padded + j, padded, in + j, stride, rows, pairs + r, R);
    }
  }
};
