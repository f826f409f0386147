// The rank terms of the LoRA layer on a CPU, for one instruction set. cpu.cpp includes this file once for each, inside
// a namespace of its own, after V (float lanes of a register) and the sizes of the register tiles.
//
// Sums are kept in float. A block of rows of X and dY stays in the caches while all that needs it is done, so that the
// large tensors are read once. Three small kernels do the work on a block; `width` is K or N:
//
//   dot     c[m][r]        = scaling * sum over j of in[m][j] * p[r][j]       S = drop(X) Aᵀ and dS = s dY B
//   expand  out[m][j]   (+)= scaling * sum over r of c[m][r] * p[r][j]        Y += s S Bᵀ and dX (+)= drop'(dS A)
//   outer   acc[r][j]     += sum over m of c[m][r] * in[m][j]                 dBᵀ = s Sᵀ dY and dA = dSᵀ drop(X)
//
// `expand` adds where `add` is set. What it writes without adding, ATen's GEMM then adds to, and nothing is read again.
//
// p is lora_A, or lora_B transposed. Blocks, p and acc have rows of whole tiles of COLUMNS, with zeros behind `width`;
// the rows of p are padded with zeros to a multiple of DOT_RANKS. What lies so already is used where it lies.
//
// An engine is how the products are made: FloatEngine below multiplies floats, BFloat16Engine in cpu_bfloat16.h pairs of
// bfloat16. A lane takes PAIR elements of the index that is summed over, which a Factor holds too.

typedef float Vec __attribute__((vector_size(4 * V)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * V)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * V)));

constexpr int TILE = 2;  // registers
constexpr int COLUMNS = TILE * V;

template <typename R, typename T>
inline R bits_of(const T& value) {
  static_assert(sizeof(R) == sizeof(T), "");
  R result;
  std::memcpy(&result, &value, sizeof(R));
  return result;
}

inline Vec splat(float a) { return a - Vec{}; }
inline std::int64_t whole(std::int64_t width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }
// From one row to the next of what we lay out ourselves (packed adapters, their gradients' sums, copies of blocks): an
// odd number of tiles, so that rows one under the other do not all claim the same places of a cache.
inline std::int64_t pitch(std::int64_t width) { return (whole(width) / COLUMNS | 1) * COLUMNS; }
// The column at which part `part` of a row's tiles begins.
inline std::int64_t share(std::int64_t width, int part, int parts) {
  return whole(width) / COLUMNS * part / parts * COLUMNS;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec load(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return bits_of<Vec>(__builtin_convertvector(h, Bits) << 16);
}
inline void store(BFloat16* p, Vec v) {  // to the nearest, ties to even; NaN stays NaN
  const Bits wide = bits_of<Bits>(v);
  const Bits rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const Bits nan = (Bits)(v != v);
  const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
  std::memcpy(p, &h, sizeof h);
}

#if defined(FROM_FLOAT16)
inline Vec load(const Float16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return bits_of<Vec>(FROM_FLOAT16(h));
}
inline void store(Float16* p, Vec v) {
  const auto h = TO_FLOAT16(v);
  std::memcpy(p, &h, sizeof h);
}
#else
inline Vec load(const Float16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Bits wide = __builtin_convertvector(h, Bits), size = wide & 0x7fffu;
  const Bits subnormal = (Bits)(size < 0x400u), infinite = (Bits)(size >= 0x7c00u);
  const Bits units = bits_of<Bits>(__builtin_convertvector(size, Vec) * 0x1p-24f);
  const Bits normal = (size << 13) + (112u << 23) + (infinite & (112u << 23));
  return bits_of<Vec>((wide & 0x8000u) << 16 | (subnormal & units) | (~subnormal & normal));
}
inline void store(Float16* p, Vec v) {
  const Bits wide = bits_of<Bits>(v), size = wide & 0x7fffffffu;
  const Bits subnormal = (Bits)(size < 113u << 23), infinite = (Bits)(size >= 143u << 23), nan = (Bits)(v != v);
  const Bits units = bits_of<Bits>(bits_of<Vec>(size) + 0.5f) - (126u << 23);  // of 2^-24, to which the sum is rounded
  const Bits normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const Bits rounded = (subnormal & units) | (~subnormal & ~infinite & normal) | (infinite & 0x7c00u) | (nan & 0x200u);
  const Halves h = __builtin_convertvector((wide >> 16 & 0x8000u) | rounded, Halves);
  std::memcpy(p, &h, sizeof h);
}
#endif

// A register of the `n` < V last elements of a row, zeros behind them; and back.
template <typename T>
inline Vec load_some(const T* p, int n) {
  T lanes[V] = {};
  std::copy_n(p, n, lanes);
  return load(lanes);
}
template <typename T>
inline void store_some(T* p, Vec v, int n) {
  T lanes[V];
  store(lanes, v);
  std::copy_n(lanes, n, p);
}

template <typename To, typename From>
inline void convert(To* to, const From* from, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + V <= count; i += V) store(to + i, load(from + i));
  const int left = static_cast<int>(count - i);
  if (left) store_some(to + i, load_some(from + i, left), left);
}

// The sums of four registers' lanes. In pairs, as a tree.
typedef float Four __attribute__((vector_size(16)));
inline Four folded(Vec v) {
  float lanes[V];
  std::memcpy(lanes, &v, sizeof v);
  Four parts[V / 4];
  std::memcpy(parts, lanes, sizeof v);
  for (int step = V / 8; step; step /= 2)
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  return parts[0];
}
inline Four sums(const Vec* v) {
  const Four a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
  const Four ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// One element's 16 random bits are a hash of its column and of two words of its row: no state, any order, any block.
struct RowKey {
  std::uint32_t first = 0, second = 0;
  RowKey() = default;
  RowKey(const Dropout& dropout, std::int64_t row) {  // splitmix64, Steele et al. 2014
    std::uint64_t z = dropout.seed + 0x9e3779b97f4a7c15u * (static_cast<std::uint64_t>(row) + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    first = static_cast<std::uint32_t>(z);
    second = static_cast<std::uint32_t>(z >> 32);
  }
};

// One hash serves two elements, 16 columns apart: its low half the first 16 of every 32 columns, its high half the rest.
inline Bits hash(const RowKey& key, std::int64_t column) {
  Bits lane;
  for (int i = 0; i < V; ++i) lane[i] = i;
  Bits h = (lane + static_cast<std::uint32_t>(column / 32 * 16 + column % 16)) * 0x9e3779b9u + key.first;
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = ((h ^ key.second) ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}
// out[i] = `scale` in the lanes of columns column + i * V... that are kept, 0 in those that are dropped.
inline void keep_factors(Vec* out, const RowKey& key, std::int64_t column, const Dropout& dropout) {
  Bits hashed = hash(key, column);
  const Bits scale = bits_of<Bits>(splat(dropout.scale));
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
    const std::int64_t at = column + i * V;
    if (V < 16 && i > 0) hashed = hash(key, at);  // a tile of 32 columns is one hash
    const Bits random = at % 32 < 16 ? hashed & 0xffffu : hashed >> 16;
    out[i] = bits_of<Vec>((Bits)(random >= dropout.threshold) & scale);
  }
}

struct FloatEngine {
  typedef float Element;  // of blocks and packed adapters
  typedef float Factor;
  typedef Vec Register;
  static constexpr int PAIR = 1;

  static Vec load(const float* p) { return NAMESPACE::load(p); }
  template <typename T>
  static void store(T* p, Vec v) {
    NAMESPACE::store(p, v);
  }
  static Vec splat(float factor) { return NAMESPACE::splat(factor); }
  static Vec add_products(Vec sum, Vec a, Vec b) { return sum + a * b; }
  // A tile of the PAIR rows at `in`, or of the `rows` that there are.
  static void load_rows(Vec* tile, const float* in, std::int64_t, int) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) tile[i] = load(in + i * V);
  }
  // A tile's columns lie in registers in an order of the engine's own: `arrange` leads from theirs to it, and
  // `in_order` back.
  static void arrange(Vec*) {}
  static void in_order(Vec*) {}
  template <typename T>
  static void load_tile(Vec* tile, const T* in) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) tile[i] = NAMESPACE::load(in + i * V);
  }
  template <typename T>
  static void store_tile(T* out, const Vec* tile) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) store(out + i * V, tile[i]);
  }

  // c[m][r] as factors of which each holds PAIR ranks, or PAIR rows.
  static const float* pair_ranks(float*, const float* c, int, int) { return c; }
  static const float* pair_rows(float*, const float* c, int, int) { return c; }
};

// A tile of p's row r, from lora_A (R, width), or from lora_B (width, R), whose rows are `stride` apart, when that is
// not 0; zeros outside of them.
template <typename E, typename P>
inline void gather(E* tile, const P* from, int r, std::int64_t column, int R, std::int64_t width, int stride) {
  const int there = r < R ? static_cast<int>(std::min<std::int64_t>(COLUMNS, width - column)) : 0;
  P other[COLUMNS], *row = other;
  if constexpr (std::is_same<E, P>::value) row = tile;
  if (stride)
    for (int j = 0; j < there; ++j) row[j] = from[(column + j) * stride + r];
  else
    std::copy_n(from + r * width + column, there, row);
  std::fill(row + there, row + COLUMNS, P{});
  if constexpr (!std::is_same<E, P>::value) convert(tile, row, COLUMNS);
}

// Part `part` of p as `dot` reads it: a row for each rank.
template <typename E>
void pack_rows(E* p, const void* from, Dtype dtype, int R, std::int64_t width, int stride, int part, int parts) {
  const std::int64_t end = share(width, part + 1, parts);
  with_dtype(dtype, [&](auto zero) {
    const auto* adapter = static_cast<const decltype(zero)*>(from);
    for (int r = 0; r < ranks(R); ++r)
      for (std::int64_t j = share(width, part, parts); j < end; j += COLUMNS)
        gather(p + r * pitch(width) + j, adapter, r, j, R, width, stride);
  });
}

// Part `part` of p as `expand` reads it: a row for each PAIR of ranks, in the engine's order.
template <typename Engine>
void pack_pairs(typename Engine::Element* p, const void* from, Dtype dtype, int R, std::int64_t width, int stride,
                int part, int parts) {
  constexpr int PAIR = Engine::PAIR;
  const std::int64_t end = share(width, part + 1, parts);
  with_dtype(dtype, [&](auto zero) {
    const auto* adapter = static_cast<const decltype(zero)*>(from);
    for (int r = 0; r < R; r += PAIR)
      for (std::int64_t j = share(width, part, parts); j < end; j += COLUMNS) {
        typename Engine::Element rows[PAIR * COLUMNS];
        for (int i = 0; i < PAIR; ++i) gather(rows + i * COLUMNS, adapter, r + i, j, R, width, stride);
        typename Engine::Register tile[TILE];
        Engine::load_rows(tile, rows, COLUMNS, PAIR);
        std::memcpy(p + r * pitch(width) + j * PAIR, tile, sizeof tile);
      }
  });
}

// Whether `block` makes a copy: rows of whole tiles that nothing drops are used where they lie.
template <typename T, typename Element>
inline bool copied(std::int64_t width, const Dropout* dropout) {
  return !std::is_same<T, Element>::value || dropout || whole(width) != width;
}

// Rows [row, row + rows) of `in`, dropped out, and the stride from one to the next.
template <typename Engine, typename T>
inline const typename Engine::Element* block(const T* in, std::int64_t& stride, std::int64_t row, int rows,
                                             std::int64_t width, const Dropout* dropout,
                                             typename Engine::Element* scratch) {
  typedef typename Engine::Element Element;
  in += row * stride;
  const std::int64_t padded = whole(width);
  if constexpr (std::is_same<T, Element>::value)
    if (!copied<T, Element>(width, dropout)) return in;
  for (int m = 0; m < rows; ++m) {
    const T* from = in + m * stride;
    Element* to = scratch + m * pitch(width);
    const RowKey key = dropout ? RowKey(*dropout, row + m) : RowKey();
    for (std::int64_t j = 0; j < padded; j += COLUMNS) {
      Vec factors[TILE] = {};
      if (dropout) keep_factors(factors, key, j, *dropout);
#pragma GCC unroll 8
      for (int i = 0; i < TILE; ++i) {
        const std::int64_t at = j + i * V, left = width - at;
        Vec v = left >= V ? load(from + at) : left > 0 ? load_some(from + at, static_cast<int>(left)) : Vec{};
        Engine::store(to + at, dropout ? v * factors[i] : v);
      }
    }
  }
  stride = pitch(width);
  return scratch;
}

template <typename Engine, int ROWS>
__attribute__((noinline))  // what is around it would take registers from its loop
void dot_rows(float* c, const typename Engine::Element* in, std::int64_t stride, const typename Engine::Element* p,
              std::int64_t p_stride, std::int64_t padded, int R, float scaling) {
  const int passes = (R + DOT_RANKS - 1) / DOT_RANKS, each = (ROWS + passes - 1) / passes;
  for (int r = 0; r < R; r += DOT_RANKS) {
    const auto* next = in + (ROWS + r / DOT_RANKS * each) * stride;
    Vec acc[ROWS][DOT_RANKS] = {};
    const auto* q = p + r * p_stride;
    for (std::int64_t j = 0; j < padded; j += V * Engine::PAIR) {
      typename Engine::Register b[DOT_RANKS];
#pragma GCC unroll 8
      for (int i = 0; i < DOT_RANKS; ++i) b[i] = Engine::load(q + i * p_stride + j);
      for (int i = 0; i < each; ++i) __builtin_prefetch(next + i * stride + j);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const typename Engine::Register a = Engine::load(in + m * stride + j);
#pragma GCC unroll 8
        for (int i = 0; i < DOT_RANKS; ++i) acc[m][i] = Engine::add_products(acc[m][i], a, b[i]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Four total = sums(acc[m]) * scaling;
      if (r + DOT_RANKS <= R)
        std::memcpy(c + m * R + r, &total, sizeof total);
      else
        for (int i = 0; r + i < R; ++i) c[m * R + r + i] = total[i];
    }
  }
}

template <typename Engine>
inline void dot(float* c, const typename Engine::Element* in, std::int64_t stride, int rows,
                const typename Engine::Element* p, std::int64_t p_stride, std::int64_t width, int R, float scaling) {
  int m = 0;
  for (; m + DOT_ROWS <= rows; m += DOT_ROWS)
    dot_rows<Engine, DOT_ROWS>(c + m * R, in + m * stride, stride, p, p_stride, whole(width), R, scaling);
  for (; m < rows; ++m) dot_rows<Engine, 1>(c + m * R, in + m * stride, stride, p, p_stride, whole(width), R, scaling);
}

// Where an output tile lies and what becomes of it. `row` and the columns count from the tensor's start, for the mask.
template <typename T>
struct Target {
  T* out;
  bool add;
  std::int64_t width, row;
  float scaling;
  const Dropout* dropout;

  Target down(int rows) const { return {out + rows * width, add, width, row + rows, scaling, dropout}; }
};

// A tile of products, scaled and dropped out, and what is to be added to it.
template <typename Engine, typename T>
inline void finish(const Target<T>& to, Vec* tile, const T* at, const RowKey& key, std::int64_t column) {
  Vec factors[TILE], there[TILE] = {};
  for (int i = 0; i < TILE; ++i) factors[i] = splat(to.scaling);
  if (to.dropout) {
    Vec keep[TILE];
    keep_factors(keep, key, column, *to.dropout);
    Engine::arrange(keep);
    for (int i = 0; i < TILE; ++i) factors[i] *= keep[i];
  }
  if (to.add) Engine::load_tile(there, at);
  for (int i = 0; i < TILE; ++i) tile[i] = there[i] + tile[i] * factors[i];
}

// The tile of ROWS rows at column j; it may be one in which the rows end.
template <typename Engine, int ROWS, typename T>
inline void expand_tile(const Target<T>& to, const RowKey* keys, const typename Engine::Factor* c,
                         const typename Engine::Element* p, std::int64_t p_stride, int steps, std::int64_t j) {
  const bool onto = to.add && !to.dropout && to.scaling == 1.0f;  // the sums start with what is there
  Vec acc[ROWS][TILE] = {};
  T* at = to.out + j;
  std::int64_t stride = to.width;
  T edge[ROWS * COLUMNS];  // stands for a tile in which the rows end
  const bool ends = to.width - j < COLUMNS;
  if (ends) {
    std::fill(edge, edge + ROWS * COLUMNS, T{});
    for (int m = 0; m < ROWS; ++m) std::copy_n(at + m * to.width, to.width - j, edge + m * COLUMNS);
    at = edge;
    stride = COLUMNS;
  }
  if (onto)
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) Engine::load_tile(acc[m], at + m * stride);
  const auto* q = p + j * Engine::PAIR;
  for (int r = 0; r < steps; ++r, q += p_stride) {
    typename Engine::Register b[TILE];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) b[i] = Engine::load(q + i * V * Engine::PAIR);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const typename Engine::Register a = Engine::splat(c[m * steps + r]);
#pragma GCC unroll 8
      for (int i = 0; i < TILE; ++i) acc[m][i] = Engine::add_products(acc[m][i], b[i], a);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    if (!onto) finish<Engine>(to, acc[m], at + m * stride, keys[m], j);
    Engine::store_tile(at + m * stride, acc[m]);
    __builtin_prefetch(to.out + (m + ROWS) * to.width + j, 1);  // the next rows
  }
  if (ends)
    for (int m = 0; m < ROWS; ++m) std::copy_n(edge + m * COLUMNS, to.width - j, to.out + m * to.width + j);
}

template <typename Engine, int ROWS, typename T>
inline void expand_rows(const Target<T>& to, const typename Engine::Factor* c, const typename Engine::Element* p,
                        int steps) {
  const std::int64_t p_stride = pitch(to.width) * Engine::PAIR;
  RowKey keys[ROWS];
  if (to.dropout)
    for (int m = 0; m < ROWS; ++m) keys[m] = RowKey(*to.dropout, to.row + m);
  for (std::int64_t j = 0; j < to.width; j += COLUMNS) expand_tile<Engine, ROWS>(to, keys, c, p, p_stride, steps, j);
}

template <typename Engine, typename T>
inline void expand(const Target<T>& to, int rows, const float* c, const typename Engine::Element* p, int R) {
  const int steps = (R + Engine::PAIR - 1) / Engine::PAIR;
  typename Engine::Factor scratch[EXPAND_ROWS * MAX_RANK / Engine::PAIR];
  for (int m = 0; m < rows; m += EXPAND_ROWS) {
    const int here = std::min(EXPAND_ROWS, rows - m);
    const auto* factors = Engine::pair_ranks(scratch, c + m * R, here, R);
    if (here == EXPAND_ROWS)
      expand_rows<Engine, EXPAND_ROWS>(to.down(m), factors, p, steps);
    else
      for (int i = 0; i < here; ++i) expand_rows<Engine, 1>(to.down(m + i), factors + i * steps, p, steps);
  }
}

// Adds to the sums of RANKS ranks over one tile of columns. Rows may lie so that the tile's pieces of them claim the same
// few places of the cache: the first ranks to come leave the pieces side by side in `kept` (FILL) for those that follow.
enum class Kept { NO, FILL, USE };
template <typename Engine, int RANKS, Kept KEPT>
inline void outer_tile(float* acc, std::int64_t acc_stride, const typename Engine::Element* in, std::int64_t stride,
                       int rows, const typename Engine::Factor* c, int R, typename Engine::Register* kept) {
  constexpr int PAIR = Engine::PAIR;
  Vec sum[RANKS][TILE];
#pragma GCC unroll 8
  for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) sum[r][i] = load(acc + r * acc_stride + i * V);
  for (int m = 0; m < rows; m += PAIR) {
    typename Engine::Register here[TILE], *a = KEPT == Kept::NO ? here : kept + m / PAIR * TILE;
    if (KEPT != Kept::USE) {
      Engine::load_rows(a, in + m * stride, stride, rows - m);
#pragma GCC unroll 8
      for (int i = 0; i < PAIR; ++i)  // down the columns, where no hardware sees a pattern
        __builtin_prefetch(in + (m + i) * stride + 4 * COLUMNS);
    }
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      const typename Engine::Register b = Engine::splat(c[m / PAIR * R + r]);
#pragma GCC unroll 8
      for (int i = 0; i < TILE; ++i) sum[r][i] = Engine::add_products(sum[r][i], a[i], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) store(acc + r * acc_stride + i * V, sum[r][i]);
}

template <typename Engine>
inline void outer(float* acc, std::int64_t width, const typename Engine::Element* in, std::int64_t stride, int rows,
                  const float* c, int R) {
  const std::int64_t acc_stride = pitch(width);
  typename Engine::Factor scratch[BLOCK * MAX_RANK / Engine::PAIR];
  typename Engine::Register kept[BLOCK / Engine::PAIR * TILE];
  const auto* factors = Engine::pair_rows(scratch, c, rows, R);
  for (std::int64_t j = 0; j < width; j += COLUMNS) {
    int r = 0;
    const auto add = [&](auto ranks, auto keep) {
      outer_tile<Engine, ranks.value, keep.value>(acc + r * acc_stride + j, acc_stride, in + j, stride, rows,
                                                  factors + r, R, kept);
      r += ranks.value;
    };
    const std::integral_constant<int, OUTER_RANKS> most{};
    if (R >= 2 * OUTER_RANKS) {
      add(most, std::integral_constant<Kept, Kept::FILL>{});
      while (r + OUTER_RANKS <= R) add(most, std::integral_constant<Kept, Kept::USE>{});
    }
    const std::integral_constant<Kept, Kept::NO> none{};
    while (r + OUTER_RANKS <= R) add(most, none);
    while (r + 2 <= R) add(std::integral_constant<int, 2>{}, none);
    if (r < R) add(std::integral_constant<int, 1>{}, none);
  }
}

// dA and dB from the parts' sums, in the order of the parts: the same bits whichever thread did which.
template <typename Engine>
void write_gradients(const Call& call, const Arena& arena, const Arena::Part<float>& gradients, std::int64_t dA_size,
                     int parts) {
  const std::int64_t N = call.N, K = call.K;
  const int R = call.R;
  const auto total = [&](auto* tile, std::int64_t at, float scaling) {
    Vec sum[TILE] = {};
    for (int part = 0; part < parts; ++part)
      for (int i = 0; i < TILE; ++i) sum[i] += load(arena(gradients, part) + at + i * V);
    Engine::in_order(sum);
    for (int i = 0; i < TILE; ++i) store(tile + i * V, sum[i] * scaling);
  };
  with_dtype(call.adapter_dtype, [&](auto zero) {
    typedef decltype(zero) P;
    parallel(parts, [&](int part) {
      P tile[MAX_RANK * COLUMNS];
      if (call.dA)
        for (int r = 0; r < R; ++r)
          for (std::int64_t j = share(K, part, parts); j < share(K, part + 1, parts); j += COLUMNS) {
            total(tile, r * pitch(K) + j, 1.0f);
            std::copy_n(tile, std::min<std::int64_t>(COLUMNS, K - j), static_cast<P*>(call.dA) + r * K + j);
          }
      if (call.dB)
        for (std::int64_t j = share(N, part, parts); j < share(N, part + 1, parts); j += COLUMNS) {
          for (int r = 0; r < R; ++r) total(tile + r * COLUMNS, dA_size + r * pitch(N) + j, call.scaling);
          P* dB = static_cast<P*>(call.dB) + j * call.rank_stride;
          for (int i = 0; i < std::min<std::int64_t>(COLUMNS, N - j); ++i, dB += call.rank_stride)
            for (int r = 0; r < R; ++r) dB[r] = tile[r * COLUMNS + i];
        }
    });
  });
}

// The layer's two calls, block by block. T is the dtype of x, y and their gradients.
template <typename T, typename Engine>
struct Kernels {
  typedef typename Engine::Element Element;

  static std::int64_t packed(int R, std::int64_t width) { return ranks(R) * pitch(width); }

  static void forward(const Call& call) {
    const std::int64_t M = call.M, N = call.N, K = call.K;
    const int R = call.R, size = block_rows(std::max(K, N) * static_cast<std::int64_t>(sizeof(Element)));
    const Dropout* dropout = call.dropout.on ? &call.dropout : nullptr;
    const std::int64_t x_size = copied<T, Element>(K, dropout) ? size * pitch(K) : 0;
    const int parts = parts_of(call, sizeof(Element) * x_size + sizeof(float) * size * R);
    // it may lie as `dot` wants it
    const bool packed_A = call.adapter_dtype == dtype_of<Element>() && K == whole(K) && R == ranks(R);
    Arena arena;
    const auto a = arena.reserve<Element>(packed_A ? 0 : packed(R, K)), b = arena.reserve<Element>(packed(R, N));
    const auto x_block = arena.reserve<Element>(x_size, parts);
    const auto c = arena.reserve<float>(size * R, parts);
    arena.allocate();
    const Element* lora_A = packed_A ? static_cast<const Element*>(call.lora_A) : arena[a];
    parallel(parts, [&](int part) {
      if (!packed_A) pack_rows(arena[a], call.lora_A, call.adapter_dtype, R, K, 0, part, parts);
      pack_pairs<Engine>(arena[b], call.lora_B, call.adapter_dtype, R, N, call.rank_stride, part, parts);
    });
    parallel(parts, [&](int part) {
      float* sums = arena(c, part);
      const std::int64_t end = M * (part + 1) / parts;
      for (std::int64_t row = M * part / parts; row < end; row += size) {
        const int rows = static_cast<int>(std::min<std::int64_t>(size, end - row));
        std::int64_t stride = call.x_stride;
        const Element* x =
            block<Engine>(static_cast<const T*>(call.x), stride, row, rows, K, dropout, arena(x_block, part));
        dot<Engine>(sums, x, stride, rows, lora_A, packed_A ? K : pitch(K), K, R, 1.0f);
        T* S = static_cast<T*>(call.S) + row * call.rank_stride;
        if (R == call.rank_stride)
          convert(S, sums, rows * R);
        else
          for (int m = 0; m < rows; ++m) convert(S + m * call.rank_stride, sums + m * R, R);
        const Target<T> y{static_cast<T*>(call.y) + row * N, true, N, row, call.scaling, nullptr};
        expand<Engine>(y, rows, sums, arena[b], R);
      }
    });
  }

  // dA, dB and the part of dX that comes through the adapter; each where its pointer is not null.
  static void backward(const Call& call) {
    const std::int64_t M = call.M, N = call.N, K = call.K;
    const int R = call.R, size = block_rows(std::max(K, N) * static_cast<std::int64_t>(sizeof(Element)));
    const Dropout* dropout = call.dropout.on ? &call.dropout : nullptr;
    const bool need_dS = call.dA || call.dx;
    const std::int64_t dA_size = call.dA ? R * pitch(K) : 0, dB_size = call.dB ? R * pitch(N) : 0;
    const std::int64_t x_size = call.dA && copied<T, Element>(K, dropout) ? size * pitch(K) : 0;
    const std::int64_t dy_size = copied<T, Element>(N, nullptr) ? size * pitch(N) : 0;
    const int parts =
        parts_of(call, sizeof(Element) * (x_size + dy_size) + sizeof(float) * (2 * size * R + dA_size + dB_size));
    Arena arena;
    const auto a = arena.reserve<Element>(call.dx ? packed(R, K) : 0);
    const auto b = arena.reserve<Element>(need_dS ? packed(R, N) : 0);
    const auto x_block = arena.reserve<Element>(x_size, parts), dy_block = arena.reserve<Element>(dy_size, parts);
    const auto coefficients = arena.reserve<float>(2 * size * R, parts);
    const auto gradients = arena.reserve<float>(dA_size + dB_size, parts);
    arena.allocate();
    parallel(parts, [&](int part) {
      if (call.dx) pack_pairs<Engine>(arena[a], call.lora_A, call.adapter_dtype, R, K, 0, part, parts);
      if (need_dS) pack_rows(arena[b], call.lora_B, call.adapter_dtype, R, N, call.rank_stride, part, parts);
    });
    parallel(parts, [&](int part) {
      float *dA = arena(gradients, part), *dB = dA + dA_size;
      float *dS = arena(coefficients, part), *S = dS + size * R;
      std::fill(dA, dB + dB_size, 0.0f);
      const std::int64_t end = M * (part + 1) / parts;
      for (std::int64_t row = M * part / parts; row < end; row += size) {
        const int rows = static_cast<int>(std::min<std::int64_t>(size, end - row));
        std::int64_t stride = call.dy_stride;
        const Element* dy =
            block<Engine>(static_cast<const T*>(call.dy), stride, row, rows, N, nullptr, arena(dy_block, part));
        if (need_dS) dot<Engine>(dS, dy, stride, rows, arena[b], pitch(N), N, R, call.scaling);
        if (call.dB) {
          const T* kept = static_cast<const T*>(call.S) + row * call.rank_stride;
          if (R == call.rank_stride)
            convert(S, kept, rows * R);
          else
            for (int m = 0; m < rows; ++m) convert(S + m * R, kept + m * call.rank_stride, R);
          outer<Engine>(dB, N, dy, stride, rows, S, R);
        }
        if (call.dA) {
          stride = call.x_stride;
          const Element* x =
              block<Engine>(static_cast<const T*>(call.x), stride, row, rows, K, dropout, arena(x_block, part));
          outer<Engine>(dA, K, x, stride, rows, dS, R);
        }
        if (call.dx) {
          const Target<T> dx{static_cast<T*>(call.dx) + row * K, call.add, K, row, 1.0f, dropout};
          expand<Engine>(dx, rows, dS, arena[a], R);
        }
      }
    });
    write_gradients<Engine>(call, arena, gradients, dA_size, parts);
  }
};

inline void mask(float* out, const Call& call) {
  for (std::int64_t row = 0; row < call.M; ++row) {
    const RowKey key(call.dropout, row);
    for (std::int64_t j = 0; j < call.K; j += COLUMNS) {
      Vec factors[TILE] = {};
      keep_factors(factors, key, j, call.dropout);
      for (int i = 0; i < TILE && j + i * V < call.K; ++i)
        store_some(out + row * call.K + j + i * V, factors[i],
                   static_cast<int>(std::min<std::int64_t>(V, call.K - j - i * V)));
    }
  }
}
