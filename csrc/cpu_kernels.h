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
// p is lora_A, or lora_B transposed, in float, its rows padded with zeros to whole registers and their number to a
// multiple of DOT_RANKS.

typedef float Vec __attribute__((vector_size(4 * V)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * V)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * V)));

template <typename R, typename T>
inline R bits_of(const T& value) {
  static_assert(sizeof(R) == sizeof(T), "");
  R result;
  std::memcpy(&result, &value, sizeof(R));
  return result;
}

inline Vec splat(float a) { return a - Vec{}; }
inline std::int64_t whole(std::int64_t n) { return (n + V - 1) / V * V; }

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
inline void store(BFloat16* p, Vec v) {  // rounds as from_float does
  const Bits wide = bits_of<Bits>(v);
  const Bits rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const Bits nan = (Bits)(v != v);
  const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
  std::memcpy(p, &h, sizeof h);
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
// `scale` in the lanes of columns column..column+V-1 that are kept, 0 in those that are dropped.
inline Vec kept(Bits hashed, std::int64_t column, const Dropout& dropout) {
  const Bits random = column % 32 < 16 ? hashed & 0xffffu : hashed >> 16;
  return bits_of<Vec>((Bits)(random >= dropout.threshold) & bits_of<Bits>(splat(dropout.scale)));
}
inline Vec kept(const RowKey& key, std::int64_t column, const Dropout& dropout) {
  return kept(hash(key, column), column, dropout);
}

// A vector of the `n` < V last elements of a row, zeros behind them; and back.
template <typename T>
inline Vec load_some(const T* p, int n) {
  float lanes[V] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <typename T>
inline void store_some(T* p, Vec v, int n) {
  float lanes[V];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}

// Rows [row, row + rows) of `in` as float, dropped out, and the stride from one to the next. Float rows of whole
// registers that nothing drops are used where they lie.
template <typename T>
inline const float* as_float(const T* in, std::int64_t& stride, std::int64_t row, int rows, std::int64_t width,
                             const Dropout* dropout, float* scratch) {
  in += row * stride;
  const std::int64_t padded = whole(width), full = width / V * V;
  if (std::is_same<T, float>::value && !dropout && padded == width) return reinterpret_cast<const float*>(in);
  for (int m = 0; m < rows; ++m) {
    const T* from = in + m * stride;
    float* to = scratch + m * padded;
    if (dropout) {
      const RowKey key(*dropout, row + m);
      std::int64_t j = 0;
      for (; V == 16 && j + 32 <= width; j += 32) {
        const Bits hashed = hash(key, j);
        store(to + j, load(from + j) * kept(hashed, 0, *dropout));
        store(to + j + V, load(from + j + V) * kept(hashed, 16, *dropout));
      }
      for (; j < full; j += V) store(to + j, load(from + j) * kept(key, j, *dropout));
      if (full < width)
        store(to + full, load_some(from + full, static_cast<int>(width - full)) * kept(key, full, *dropout));
    } else {
      for (std::int64_t j = 0; j < full; j += V) store(to + j, load(from + j));
      if (full < width) store(to + full, load_some(from + full, static_cast<int>(width - full)));
    }
  }
  stride = padded;
  return scratch;
}

template <int ROWS>
inline void dot_rows(float* c, const float* in, std::int64_t stride, const float* p, std::int64_t padded, int R,
                     float scaling) {
  for (int r = 0; r < R; r += DOT_RANKS) {
    Vec acc[ROWS][DOT_RANKS] = {};
    const float* q = p + r * padded;
    for (std::int64_t j = 0; j < padded; j += V) {
      Vec b[DOT_RANKS];
#pragma GCC unroll 8
      for (int i = 0; i < DOT_RANKS; ++i) b[i] = load(q + i * padded + j);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const Vec a = load(in + m * stride + j);
#pragma GCC unroll 8
        for (int i = 0; i < DOT_RANKS; ++i) acc[m][i] += a * b[i];
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

inline void dot(float* c, const float* in, std::int64_t stride, int rows, const float* p, std::int64_t padded, int R,
                float scaling) {
  int m = 0;
  for (; m + DOT_ROWS <= rows; m += DOT_ROWS)
    dot_rows<DOT_ROWS>(c + m * R, in + m * stride, stride, p, padded, R, scaling);
  for (; m < rows; ++m) dot_rows<1>(c + m * R, in + m * stride, stride, p, padded, R, scaling);
}

// ROWS rows by VECTORS registers of columns; `left` columns remain, fewer than the tile has in its last place only.
template <int ROWS, int VECTORS, typename T>
inline void expand_tile(T* out, bool add, std::int64_t stride, std::int64_t j, std::int64_t left, const float* c,
                        const float* p, std::int64_t padded, int R, float scaling, const RowKey* keys,
                        const Dropout* dropout) {
  Vec acc[ROWS][VECTORS] = {};
  for (int r = 0; r < R; ++r) {
    Vec b[VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) b[i] = load(p + r * padded + j + i * V);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const float a = c[m * R + r];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) acc[m][i] += a * b[i];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    Bits hashed{};
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) {
      Vec v = acc[m][i] * scaling;
      if (dropout) {
        if (V < 16 || VECTORS == 1 || i == 0) hashed = hash(keys[m], j + i * V);
        v *= kept(hashed, j + i * V, *dropout);
      }
      T* to = out + m * stride + j + i * V;
      if (left >= (i + 1) * V) {
        store(to, add ? load(to) + v : v);
      } else {
        const int here = static_cast<int>(left - i * V);
        store_some(to, add ? load_some(to, here) + v : v, here);
      }
    }
  }
}

template <int ROWS, typename T>
inline void expand_rows(T* out, bool add, std::int64_t stride, std::int64_t row, std::int64_t width,
                        const float* c, const float* p, int R, float scaling, const Dropout* dropout) {
  const std::int64_t padded = whole(width);
  RowKey keys[ROWS];
  if (dropout)
    for (int m = 0; m < ROWS; ++m) keys[m] = RowKey(*dropout, row + m);
  std::int64_t j = 0;
  for (; j + EXPAND_VECTORS * V <= width; j += EXPAND_VECTORS * V)
    expand_tile<ROWS, EXPAND_VECTORS>(out, add, stride, j, width - j, c, p, padded, R, scaling, keys, dropout);
  for (; j < width; j += V)
    expand_tile<ROWS, 1>(out, add, stride, j, width - j, c, p, padded, R, scaling, keys, dropout);
}

// `row` counts from the start of the whole tensor, for its dropout mask; `out` points to that row.
template <typename T>
inline void expand(T* out, bool add, std::int64_t stride, std::int64_t row, int rows,
                   std::int64_t width, const float* c, const float* p, int R, float scaling, const Dropout* dropout) {
  int m = 0;
  for (; m + EXPAND_ROWS <= rows; m += EXPAND_ROWS)
    expand_rows<EXPAND_ROWS>(out + m * stride, add, stride, row + m, width, c + m * R, p, R, scaling, dropout);
  for (; m < rows; ++m)
    expand_rows<1>(out + m * stride, add, stride, row + m, width, c + m * R, p, R, scaling, dropout);
}

template <int RANKS, int VECTORS>
inline void outer_tile(float* acc, std::int64_t padded, const float* in, std::int64_t stride, int rows, const float* c,
                       int R) {
  Vec sum[RANKS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) sum[r][i] = load(acc + r * padded + i * V);
  for (int m = 0; m < rows; ++m) {
    Vec a[VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) a[i] = load(in + m * stride + i * V);
    __builtin_prefetch(in + m * stride + VECTORS * V);  // down the columns, where no hardware sees a pattern
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) sum[r][i] += c[m * R + r] * a[i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) store(acc + r * padded + i * V, sum[r][i]);
}

template <int VECTORS>
inline void outer_columns(float* acc, std::int64_t padded, const float* in, std::int64_t stride, int rows,
                          const float* c, int R) {
  int r = 0;
  for (; r + OUTER_RANKS <= R; r += OUTER_RANKS)
    outer_tile<OUTER_RANKS, VECTORS>(acc + r * padded, padded, in, stride, rows, c + r, R);
  for (; r + 2 <= R; r += 2) outer_tile<2, VECTORS>(acc + r * padded, padded, in, stride, rows, c + r, R);
  if (r < R) outer_tile<1, VECTORS>(acc + r * padded, padded, in, stride, rows, c + r, R);
}

inline void outer(float* acc, std::int64_t padded, const float* in, std::int64_t stride, int rows, const float* c,
                  int R) {
  std::int64_t j = 0;
  for (; j + OUTER_VECTORS * V <= padded; j += OUTER_VECTORS * V)
    outer_columns<OUTER_VECTORS>(acc + j, padded, in + j, stride, rows, c, R);
  for (; j < padded; j += V) outer_columns<1>(acc + j, padded, in + j, stride, rows, c, R);
}

// The float kernels under the names that Kernels calls an engine's by.
struct FloatEngine {
  typedef float Element;  // of blocks and packed adapters
  static std::int64_t whole(std::int64_t n) { return (n + V - 1) / V * V; }
  static std::int64_t packed(int R, std::int64_t width) { return ranks(R) * whole(width); }
  static std::int64_t position(std::int64_t j) { return j; }  // of column j in a row of outer's sums

  // p[r][j] from lora_A (R, width), or from lora_B (width, R) when `transposed`; zeros where there is none.
  template <typename P>
  static void pack(float* p, const P* from, int R, std::int64_t width, bool transposed) {
    const std::int64_t padded = whole(width);
    std::fill(p, p + packed(R, width), 0.0f);
    if (transposed) {
      for (std::int64_t j = 0; j < width; ++j)
        for (int r = 0; r < R; ++r) p[r * padded + j] = to_float(from[j * R + r]);
    } else {
      for (int r = 0; r < R; ++r)
        for (std::int64_t j = 0; j < width; ++j) p[r * padded + j] = to_float(from[r * width + j]);
    }
  }
  template <typename P>
  static void pack_for_dot(float* p, const P* from, int R, std::int64_t width, bool transposed) {
    pack(p, from, R, width, transposed);
  }
  template <typename P>
  static void pack_for_expand(float* p, const P* from, int R, std::int64_t width, bool transposed) {
    pack(p, from, R, width, transposed);
  }
  template <typename T>
  static const float* block(const T* in, std::int64_t& stride, std::int64_t row, int rows, std::int64_t width,
                            const Dropout* dropout, float* scratch) {
    return as_float(in, stride, row, rows, width, dropout, scratch);
  }
  static void dot(float* c, const float* in, std::int64_t stride, int rows, const float* p, std::int64_t width, int R,
                  float scaling) {
    NAMESPACE::dot(c, in, stride, rows, p, whole(width), R, scaling);
  }
  template <typename T>
  static void expand(T* out, bool add, std::int64_t stride, std::int64_t row, int rows,
                     std::int64_t width, const float* c, const float* p, int R, float scaling,
                     const Dropout* dropout) {
    NAMESPACE::expand(out, add, stride, row, rows, width, c, p, R, scaling, dropout);
  }
  static void outer(float* acc, std::int64_t width, const float* in, std::int64_t stride, int rows, const float* c,
                    int R) {
    NAMESPACE::outer(acc, whole(width), in, stride, rows, c, R);
  }
};

// lora_A for `dot`: where it lies if that is how `dot` wants it, else packed into `scratch`.
template <typename Engine, typename P>
inline const typename Engine::Element* for_dot(const void* from, int R, std::int64_t width,
                                               typename Engine::Element* scratch) {
  typedef typename Engine::Element Element;
  if (std::is_same<P, Element>::value && width == Engine::whole(width) && R == ranks(R))
    return static_cast<const Element*>(from);
  Engine::pack_for_dot(scratch, static_cast<const P*>(from), R, width, false);
  return scratch;
}

// The layer's two calls, block by block. T is the dtype of x, y and their gradients, P that of the adapters.
template <typename T, typename P, typename Engine>
struct Kernels {
  typedef typename Engine::Element Element;

  static void forward(const Call& call) {
    const std::int64_t M = call.M, N = call.N, K = call.K;
    const int R = call.R, parts = call.parts(0);
    const Dropout* dropout = call.dropout.on ? &call.dropout : nullptr;
    const int size = block_rows(std::max(K, N) * static_cast<std::int64_t>(sizeof(Element)));
    Arena arena;
    const auto a = arena.reserve<Element>(Engine::packed(R, K)), b = arena.reserve<Element>(Engine::packed(R, N));
    const auto block = arena.reserve<Element>(size * Engine::whole(K), parts);
    const auto c = arena.reserve<float>(size * R, parts);
    arena.allocate();
    const Element* lora_A = for_dot<Engine, P>(call.lora_A, R, K, arena[a]);
    Engine::pack_for_expand(arena[b], static_cast<const P*>(call.lora_B), R, N, true);
    parallel(parts, [&](int part) {
      float* sums = arena(c, part);
      const std::int64_t end = M * (part + 1) / parts;
      for (std::int64_t row = M * part / parts; row < end; row += size) {
        const int rows = static_cast<int>(std::min<std::int64_t>(size, end - row));
        std::int64_t stride = call.x_stride;
        const Element* x =
            Engine::block(static_cast<const T*>(call.x), stride, row, rows, K, dropout, arena(block, part));
        Engine::dot(sums, x, stride, rows, lora_A, K, R, 1.0f);
        T* S = static_cast<T*>(call.S) + row * R;
        for (int i = 0; i < rows * R; ++i) S[i] = from_float<T>(sums[i]);
        Engine::expand(static_cast<T*>(call.y) + row * N, true, N, row, rows, N, sums, arena[b], R, call.scaling,
                       nullptr);
      }
    });
  }

  // dA, dB and the part of dX that comes through the adapter; each where its pointer is not null.
  static void backward(const Call& call) {
    const std::int64_t M = call.M, N = call.N, K = call.K;
    const int R = call.R, parts = call.parts(sizeof(float) * R * (Engine::whole(K) + Engine::whole(N)));
    const Dropout* dropout = call.dropout.on ? &call.dropout : nullptr;
    const bool need_dS = call.dA || call.dx;
    const std::int64_t dA_size = call.dA ? R * Engine::whole(K) : 0, dB_size = call.dB ? R * Engine::whole(N) : 0;
    const int size = block_rows(std::max(K, N) * static_cast<std::int64_t>(sizeof(Element)));
    Arena arena;
    const auto a = arena.reserve<Element>(Engine::packed(R, K)), b = arena.reserve<Element>(Engine::packed(R, N));
    const auto x_block = arena.reserve<Element>(size * Engine::whole(K), parts);
    const auto dy_block = arena.reserve<Element>(size * Engine::whole(N), parts);
    const auto coefficients = arena.reserve<float>(2 * size * R, parts);
    const auto gradients = arena.reserve<float>(dA_size + dB_size, parts);
    arena.allocate();
    if (call.dx) Engine::pack_for_expand(arena[a], static_cast<const P*>(call.lora_A), R, K, false);
    if (need_dS) Engine::pack_for_dot(arena[b], static_cast<const P*>(call.lora_B), R, N, true);
    parallel(parts, [&](int part) {
      float *dA = arena(gradients, part), *dB = dA + dA_size;
      float *dS = arena(coefficients, part), *S = dS + size * R;
      std::fill(dA, dB + dB_size, 0.0f);
      const std::int64_t end = M * (part + 1) / parts;
      for (std::int64_t row = M * part / parts; row < end; row += size) {
        const int rows = static_cast<int>(std::min<std::int64_t>(size, end - row));
        std::int64_t stride = call.dy_stride;
        const Element* dy =
            Engine::block(static_cast<const T*>(call.dy), stride, row, rows, N, nullptr, arena(dy_block, part));
        if (need_dS) Engine::dot(dS, dy, stride, rows, arena[b], N, R, call.scaling);
        if (call.dB) {
          const T* from = static_cast<const T*>(call.S) + row * R;
          for (int i = 0; i < rows * R; ++i) S[i] = to_float(from[i]);
          Engine::outer(dB, N, dy, stride, rows, S, R);
        }
        if (call.dA) {
          stride = call.x_stride;
          const Element* x =
              Engine::block(static_cast<const T*>(call.x), stride, row, rows, K, dropout, arena(x_block, part));
          Engine::outer(dA, K, x, stride, rows, dS, R);
        }
        if (call.dx)
          Engine::expand(static_cast<T*>(call.dx) + row * K, call.add, K, row,
                         rows, K, dS, arena[a], R, 1.0f, dropout);
      }
    });
    // The parts' sums, in the order of the parts: the same bits whichever thread did which. Each part sums some columns.
    const auto total = [&](std::int64_t at) {
      float sum = 0.0f;
      for (int part = 0; part < parts; ++part) sum += arena(gradients, part)[at];
      return sum;
    };
    parallel(parts, [&](int part) {
      if (call.dA)
        for (int r = 0; r < R; ++r)
          for (std::int64_t j = K * part / parts; j < K * (part + 1) / parts; ++j)
            static_cast<P*>(call.dA)[r * K + j] = from_float<P>(total(r * Engine::whole(K) + Engine::position(j)));
      if (call.dB)
        for (std::int64_t j = N * part / parts; j < N * (part + 1) / parts; ++j)
          for (int r = 0; r < R; ++r)
            static_cast<P*>(call.dB)[j * R + r] =
                from_float<P>(call.scaling * total(dA_size + r * Engine::whole(N) + Engine::position(j)));
    });
  }
};

inline void mask(float* out, const Call& call) {
  for (std::int64_t row = 0; row < call.M; ++row) {
    const RowKey key(call.dropout, row);
    for (std::int64_t j = 0; j < call.K; j += V)
      store_some(out + row * call.K + j, kept(key, j, call.dropout),
                 static_cast<int>(std::min<std::int64_t>(V, call.K - j)));
  }
}
