// The products of cpu_kernels.h on AVX-512's bfloat16 dot product, for x and adapters that are both bfloat16: it
// multiplies pairs and adds them in float, twice the work of a float instruction and what ATen's own GEMMs there use.
//
// A pair runs along the index that is summed over: `dot` finds its pairs where they lie, `outer` interleaves two rows,
// `expand` has its ranks interleaved when they are packed. Interleaving works within 128 bits: of a tile's columns, the
// first register has the first four of every eight, the second the others. What eager rounds to bfloat16, S and dS, is
// rounded here.

struct BFloat16Engine {
  typedef BFloat16 Element;
  typedef std::uint32_t Factor;  // two bfloat16, the first in the low half
  typedef Bits Register;
  static constexpr int PAIR = 2;

  static Bits load(const BFloat16* p) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static void store(BFloat16* p, Vec v) {
    const auto rounded = _mm512_cvtneps_pbh(bits_of<__m512>(v));
    std::memcpy(p, &rounded, sizeof rounded);
  }
  static Bits splat(Factor pair) { return bits_of<Bits>(_mm512_set1_epi32(static_cast<int>(pair))); }
  static Vec add_products(Vec sum, Bits a, Bits b) {
    return bits_of<Vec>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
  }

  static void load_rows(Bits* tile, const BFloat16* in, std::int64_t stride, int rows) {
    const __m512i first = bits_of<__m512i>(load(in));
    const __m512i second = rows > 1 ? bits_of<__m512i>(load(in + stride)) : __m512i{};
    tile[0] = bits_of<Bits>(_mm512_unpacklo_epi16(first, second));
    tile[1] = bits_of<Bits>(_mm512_unpackhi_epi16(first, second));
  }
  static void arrange(Vec* tile) {
    permute(tile, _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0), 4);
  }
  static void in_order(Vec* tile) {
    permute(tile, _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0), 8);
  }
  // Lane i of the first register comes from lane first[i] of both, of the second from `step` lanes behind it.
  static void permute(Vec* tile, __m512i first, int step) {
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(step));
    const __m512 low = bits_of<__m512>(tile[0]), high = bits_of<__m512>(tile[1]);
    tile[0] = bits_of<Vec>(_mm512_permutex2var_ps(low, first, high));
    tile[1] = bits_of<Vec>(_mm512_permutex2var_ps(low, second, high));
  }
  static void load_tile(Vec* tile, const BFloat16* in) {
    const __m512i halves = bits_of<__m512i>(load(in));
    tile[0] = bits_of<Vec>(_mm512_unpacklo_epi16(__m512i{}, halves));
    tile[1] = bits_of<Vec>(_mm512_unpackhi_epi16(__m512i{}, halves));
  }
  static void store_tile(BFloat16* out, const Vec* tile) {
    std::uint16_t order[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) order[j] = static_cast<std::uint16_t>(j / 8 * 4 + j % 4 + j % 8 / 4 * 16);
    const auto rounded = _mm512_cvtne2ps_pbh(bits_of<__m512>(tile[1]), bits_of<__m512>(tile[0]));
    const __m512i halves = _mm512_permutexvar_epi16(bits_of<__m512i>(order), bits_of<__m512i>(rounded));
    std::memcpy(out, &halves, sizeof halves);
  }

  static __mmask16 first(int n) { return static_cast<__mmask16>(n >= V ? 0xffff : (1 << n) - 1); }
  // Of V numbers the first `n`, rounded, and zeros.
  static Halves rounded(const float* c, int n) {
    return bits_of<Halves>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n), c)));
  }
  static const Factor* pair_ranks(Factor* pairs, const float* c, int rows, int R) {
    const int steps = (R + 1) / 2;
    for (int m = 0; m < rows; ++m)
      for (int r = 0; r < R; r += V)
        _mm256_mask_storeu_epi32(pairs + m * steps + r / 2, static_cast<__mmask8>(first(steps - r / 2)),
                                 bits_of<__m256i>(rounded(c + m * R + r, R - r)));
    return pairs;
  }
  static const Factor* pair_rows(Factor* pairs, const float* c, int rows, int R) {
    for (int m = 0; m < rows; m += 2)
      for (int r = 0; r < R; r += V) {
        const Bits low = __builtin_convertvector(rounded(c + m * R + r, R - r), Bits);
        const Bits high = __builtin_convertvector(rounded(c + (m + 1) * R + r, m + 1 < rows ? R - r : 0), Bits);
        _mm512_mask_storeu_epi32(pairs + m / 2 * R + r, first(R - r), bits_of<__m512i>(low | high << 16));
      }
    return pairs;
  }
};
