// Direct sparse convolution on blocks of 16 images: a value is [channel][row][column][16], one image per lane.
//
// The same source is compiled once per instruction set (-mavx512f, -mavx2 -mfma, or neither); `engine_run` is all that is
// called. Every lane does the same operations whatever the other lanes hold, so an image's result does not depend on its batch.
// The structs mirror bench/engine/program.py.
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

// ---- one pixel of 16 images -------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int TILE = 16;  // pixels whose sums are held in registers

struct Pixel {
    __m512 v;
};
inline Pixel load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Pixel a) { _mm512_storeu_ps(p, a.v); }
inline Pixel spread(float a) { return {_mm512_set1_ps(a)}; }
inline Pixel add(Pixel a, Pixel b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Pixel subtract(Pixel a, Pixel b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Pixel madd(Pixel a, Pixel b, Pixel c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Pixel relu(Pixel a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // NaN stays NaN
inline unsigned passes(Pixel a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
inline Pixel keep(Pixel a, unsigned lanes) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), a.v)}; }

#elif defined(__AVX2__)

constexpr int TILE = 4;

struct Pixel {
    __m256 lo, hi;
};
inline Pixel load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Pixel a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline Pixel spread(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Pixel add(Pixel a, Pixel b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Pixel subtract(Pixel a, Pixel b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Pixel madd(Pixel a, Pixel b, Pixel c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Pixel relu(Pixel a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.lo), _mm256_max_ps(_mm256_setzero_ps(), a.hi)}; }
inline unsigned passes(Pixel a) {
    const __m256 zero = _mm256_setzero_ps();
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, zero, _CMP_NLE_UQ))) |
           static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, zero, _CMP_NLE_UQ))) << 8;
}
inline __m256 kept(__m256 a, unsigned lanes) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit), bit);
    return _mm256_and_ps(a, _mm256_castsi256_ps(on));
}
inline Pixel keep(Pixel a, unsigned lanes) { return {kept(a.lo, lanes), kept(a.hi, lanes >> 8)}; }

#else

constexpr int TILE = 2;
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef int32_t Whether __attribute__((vector_size(16), aligned(4)));

struct Pixel {
    Four v[4];
};
inline Pixel load(const float* p) {
    Pixel a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, Pixel a) { std::memcpy(p, &a, sizeof a); }
inline Pixel spread(float a) {
    const Four all = {a, a, a, a};
    return {{all, all, all, all}};
}
inline Pixel add(Pixel a, Pixel b) {
    for (int k = 0; k < 4; k++) a.v[k] += b.v[k];
    return a;
}
inline Pixel subtract(Pixel a, Pixel b) {
    for (int k = 0; k < 4; k++) a.v[k] -= b.v[k];
    return a;
}
inline Pixel madd(Pixel a, Pixel b, Pixel c) {
    for (int k = 0; k < 4; k++) c.v[k] += a.v[k] * b.v[k];
    return c;
}
inline Pixel relu(Pixel a) {
    for (int k = 0; k < 4; k++) {
        const Whether off = a.v[k] <= Four{};  // false for NaN
        a.v[k] = (Four)((Whether)a.v[k] & ~off);
    }
    return a;
}
inline unsigned passes(Pixel a) {
    unsigned lanes = 0;
    for (int k = 0; k < LANES; k++) lanes |= static_cast<unsigned>(!(a.v[k / 4][k % 4] <= 0.0f)) << k;
    return lanes;
}
inline Pixel keep(Pixel a, unsigned lanes) {
    for (int k = 0; k < 4; k++) {
        const int four = static_cast<int>(lanes >> (4 * k));
        const Whether bit = {1, 2, 4, 8}, on = (Whether{four, four, four, four} & bit) == bit;
        a.v[k] = (Four)((Whether)a.v[k] & on);
    }
    return a;
}

#endif

// ---- a step -----------------------------------------------------------------------------------------------------------

enum Kind : int64_t { PACK, UNPACK, CONVOLVE, POINTWISE, MAX_POOL, MAX_POOL_BACK, AVERAGE_POOL, AVERAGE_POOL_BACK };

// Values at output position (channel c, row y, column x): p + at[c] + y * row + x * column, in floats.
struct Place {
    float* p;
    const int64_t* at;
    int64_t row, column;

    float* of(int64_t c, int64_t y, int64_t x) const { return p + at[c] + y * row + x * column; }
};

// Windows of a pooling along one direction: output k covers inputs [first[k], last[k]); input i lies in outputs [from[i], to[i]).
struct Windows {
    const int32_t *first, *last, *from, *to;
};

struct Step {
    int64_t kind, channels, rows, columns;  // of the positions that are written
    Place in, out, addend;                  // addend.p may be null: added before the ReLU or the mask
    Place bits;                             // only at, row and column: 2 bytes per pixel, a bit per image
    int64_t relu;                           // whether the result goes through a ReLU
    int64_t bits_written, bits_read;        // offsets in the block's record, -1 for none
    const int32_t *taps, *offset;           // convolution: taps of channel c are taps[c] .. taps[c + 1]; where each one reads
    const float* weight;
    const float *shift, *scale, *bias;      // pointwise and pack: (v - shift) * scale + bias; may be null
    Windows down, across;                   // pooling, along the rows and along the columns
    const float* share;                     // average pooling: [rows of outputs][columns of outputs]
    int64_t outputs_across;                 // columns of a pooling's outputs
    int64_t which, which_channel;           // max pooling: which input won, 16 bytes per output; offset in the record, stride
};

// What a step does with COLUMNS neighbouring pixels of a row before they are written.
template <int COLUMNS>
inline void finish(const Step& s, Pixel* v, int64_t c, int64_t y, int64_t x, uint8_t* record) {
    if (s.addend.p) {
        const float* more = s.addend.of(c, y, x);
        for (int i = 0; i < COLUMNS; i++) v[i] = add(v[i], load(more + i * s.addend.column));
    }
    const int64_t bit = 2 * (s.bits.at[c] + y * s.bits.row + x * s.bits.column), next = 2 * s.bits.column;
    if (s.relu) {
        if (record) {
            uint8_t* bits = record + s.bits_written + bit;
            for (int i = 0; i < COLUMNS; i++) {
                const uint16_t lanes = static_cast<uint16_t>(passes(v[i]));
                std::memcpy(bits + i * next, &lanes, 2);
            }
        }
        for (int i = 0; i < COLUMNS; i++) v[i] = relu(v[i]);
    }
    if (s.bits_read >= 0) {
        const uint8_t* bits = record + s.bits_read + bit;
        for (int i = 0; i < COLUMNS; i++) {
            uint16_t lanes;
            std::memcpy(&lanes, bits + i * next, 2);
            v[i] = keep(v[i], lanes);
        }
    }
    float* out = s.out.of(c, y, x);
    for (int i = 0; i < COLUMNS; i++) store(out + i * s.out.column, v[i]);
}

inline void finish(const Step& s, Pixel v, int64_t c, int64_t y, int64_t x, uint8_t* record) {
    finish<1>(s, &v, c, y, x, record);
}

// ---- convolution ------------------------------------------------------------------------------------------------------

// STEP: floats between the inputs of neighbouring columns where that is known to the compiler, else 0.
template <int ROWS, int COLUMNS, int STEP>
__attribute__((noinline)) void tile(const Step& s, int64_t y, int64_t x, uint8_t* record) {
    constexpr int PIXELS = ROWS * COLUMNS;
    constexpr int CHAINS = PIXELS * 4 <= TILE ? 4 : PIXELS * 2 <= TILE ? 2 : 1;  // few pixels: independent sums hide latency
    const float* base = s.in.p + y * s.in.row + x * s.in.column;
    const int64_t row = s.in.row, column = STEP ? STEP : s.in.column;
    for (int64_t c = 0; c < s.channels; c++) {
        if (c + 1 < s.channels) {  // memory is what most layers wait for: have the next channel's pixels fetched meanwhile
            const char* next = reinterpret_cast<const char*>(s.out.of(c + 1, y, x));
            for (int j = 0; j < ROWS; j++)
                for (int i = 0; i < COLUMNS; i++) __builtin_prefetch(next + 4 * (j * s.out.row + i * s.out.column), 1, 3);
        }
        Pixel sum[CHAINS][ROWS][COLUMNS];
        for (int h = 0; h < CHAINS; h++)
            for (int j = 0; j < ROWS; j++)
                for (int i = 0; i < COLUMNS; i++) sum[h][j][i] = spread(h || !s.bias ? 0.0f : s.bias[c]);
        int32_t k = s.taps[c];
        const int32_t end = s.taps[c + 1];
        for (; k + CHAINS <= end; k += CHAINS)
            for (int h = 0; h < CHAINS; h++) {
                const Pixel w = spread(s.weight[k + h]);
                const float* from = base + s.offset[k + h];
                for (int j = 0; j < ROWS; j++, from += row)
                    for (int i = 0; i < COLUMNS; i++) sum[h][j][i] = madd(w, load(from + i * column), sum[h][j][i]);
            }
        for (; k < end; k++) {
            const Pixel w = spread(s.weight[k]);
            const float* from = base + s.offset[k];
            for (int j = 0; j < ROWS; j++, from += row)
                for (int i = 0; i < COLUMNS; i++) sum[0][j][i] = madd(w, load(from + i * column), sum[0][j][i]);
        }
        for (int j = 0; j < ROWS; j++) {
            for (int h = 1; h < CHAINS; h++)
                for (int i = 0; i < COLUMNS; i++) sum[0][j][i] = add(sum[0][j][i], sum[h][j][i]);
            finish<COLUMNS>(s, sum[0][j], c, y + j, x, record);
        }
    }
}

// The columns x .. end: bands of as many rows as a tile takes, then of fewer.
template <int ROWS, int COLUMNS, int STEP>
void bands(const Step& s, int64_t y, int64_t x, int64_t end, uint8_t* record) {
    for (; y + ROWS <= s.rows; y += ROWS)
        for (int64_t i = x; i < end; i += COLUMNS) tile<ROWS, COLUMNS, STEP>(s, y, i, record);
    if constexpr (ROWS > 1) bands<ROWS / 2, COLUMNS, STEP>(s, y, x, end, record);
}

// As many columns as there are tiles for, then narrower tiles.
template <int COLUMNS, int STEP>
void strips(const Step& s, int64_t x, uint8_t* record) {
    const int64_t end = x + (s.columns - x) / COLUMNS * COLUMNS;
    bands<TILE / COLUMNS, COLUMNS, STEP>(s, 0, x, end, record);
    if constexpr (COLUMNS > 1) strips<COLUMNS / 2, STEP>(s, end, record);
}

void convolve(const Step& s, uint8_t* record) {
    if (s.in.column == LANES) strips<TILE, LANES>(s, 0, record);
    else strips<TILE, 0>(s, 0, record);
}

// ---- everything else --------------------------------------------------------------------------------------------------

template <typename Function>
void everywhere(const Step& s, Function value) {
    for (int64_t c = 0; c < s.channels; c++)
        for (int64_t y = 0; y < s.rows; y++)
            for (int64_t x = 0; x < s.columns; x++) value(c, y, x);
}

void pointwise(const Step& s, uint8_t* record) {
    everywhere(s, [&](int64_t c, int64_t y, int64_t x) {
        Pixel v = load(s.in.of(c, y, x));
        if (s.scale) v = madd(subtract(v, spread(s.shift[c])), spread(s.scale[c]), spread(s.bias[c]));
        finish(s, v, c, y, x, record);
    });
}

void max_pool(const Step& s, uint8_t* record) {
    everywhere(s, [&](int64_t c, int64_t y, int64_t x) {
        float best[LANES];
        int32_t which[LANES] = {};
        for (float& one : best) one = -std::numeric_limits<float>::infinity();
        int32_t here = 0;
        for (int64_t j = s.down.first[y]; j < s.down.last[y]; j++)
            for (int64_t i = s.across.first[x]; i < s.across.last[x]; i++, here++) {
                const float* v = s.in.of(c, j, i);
                for (int k = 0; k < LANES; k++) {
                    const bool larger = v[k] > best[k] || v[k] != v[k];  // the first of equal ones, and any NaN
                    best[k] = larger ? v[k] : best[k];
                    which[k] = larger ? here : which[k];
                }
            }
        if (record && s.which >= 0) {
            uint8_t* kept = record + s.which + c * s.which_channel + (y * s.outputs_across + x) * LANES;
            for (int k = 0; k < LANES; k++) kept[k] = static_cast<uint8_t>(which[k]);
        }
        finish(s, load(best), c, y, x, record);
    });
}

void max_pool_back(const Step& s, uint8_t* record) {
    everywhere(s, [&](int64_t c, int64_t y, int64_t x) {
        float sum[LANES] = {};
        for (int64_t j = s.down.from[y]; j < s.down.to[y]; j++)
            for (int64_t i = s.across.from[x]; i < s.across.to[x]; i++) {
                const int64_t width = s.across.last[i] - s.across.first[i];
                const int64_t here = (y - s.down.first[j]) * width + x - s.across.first[i];
                const uint8_t* which = record + s.which + c * s.which_channel + (j * s.outputs_across + i) * LANES;
                const float* v = s.in.of(c, j, i);
                for (int k = 0; k < LANES; k++) sum[k] += which[k] == here ? v[k] : 0.0f;
            }
        finish(s, load(sum), c, y, x, record);
    });
}

void average_pool(const Step& s, uint8_t* record) {
    everywhere(s, [&](int64_t c, int64_t y, int64_t x) {
        Pixel sum = spread(0.0f);
        for (int64_t j = s.down.first[y]; j < s.down.last[y]; j++)
            for (int64_t i = s.across.first[x]; i < s.across.last[x]; i++) sum = add(sum, load(s.in.of(c, j, i)));
        finish(s, madd(sum, spread(s.share[y * s.outputs_across + x]), spread(0.0f)), c, y, x, record);
    });
}

void average_pool_back(const Step& s, uint8_t* record) {
    everywhere(s, [&](int64_t c, int64_t y, int64_t x) {
        Pixel sum = spread(0.0f);
        for (int64_t j = s.down.from[y]; j < s.down.to[y]; j++)
            for (int64_t i = s.across.from[x]; i < s.across.to[x]; i++)
                sum = madd(load(s.in.of(c, j, i)), spread(s.share[j * s.outputs_across + i]), sum);
        finish(s, sum, c, y, x, record);
    });
}

// Images [images][channels][rows][columns] into a block; lanes without an image hold zeros.
void pack(const Step& s, const float* x, int64_t images) {
    const int64_t plane = s.rows * s.columns;
    everywhere(s, [&](int64_t c, int64_t y, int64_t i) {
        float v[LANES] = {};
        for (int64_t k = 0; k < images; k++) v[k] = x[(k * s.channels + c) * plane + y * s.columns + i];
        Pixel pixel = load(v);
        if (s.scale) pixel = madd(subtract(pixel, spread(s.shift[c])), spread(s.scale[c]), spread(s.bias[c]));
        store(s.out.of(c, y, i), pixel);
    });
}

void unpack(const Step& s, float* x, int64_t images) {
    const int64_t plane = s.rows * s.columns;
    everywhere(s, [&](int64_t c, int64_t y, int64_t i) {
        const float* v = s.in.of(c, y, i);
        const float scale = s.scale ? s.scale[c] : 1.0f;
        for (int64_t k = 0; k < images; k++) x[(k * s.channels + c) * plane + y * s.columns + i] = scale * v[k];
    });
}

}  // namespace

// from: [images][in_size], to: [images][out_size]; record: [blocks][record_size] bytes, or null where no gradient is wanted.
extern "C" void engine_run(const Step* steps, int64_t count, const float* from, int64_t in_size, float* to, int64_t out_size,
                           int64_t images, uint8_t* record, int64_t record_size) {
    for (int64_t first = 0, block = 0; first < images; first += LANES, block++) {
        const int64_t now = images - first < LANES ? images - first : LANES;
        uint8_t* kept = record ? record + block * record_size : nullptr;
        for (int64_t k = 0; k < count; k++) {
            const Step& s = steps[k];
            switch (s.kind) {
                case PACK: pack(s, from + first * in_size, now); break;
                case UNPACK: unpack(s, to + first * out_size, now); break;
                case CONVOLVE: convolve(s, kept); break;
                case POINTWISE: pointwise(s, kept); break;
                case MAX_POOL: max_pool(s, kept); break;
                case MAX_POOL_BACK: max_pool_back(s, kept); break;
                case AVERAGE_POOL: average_pool(s, kept); break;
                case AVERAGE_POOL_BACK: average_pool_back(s, kept); break;
            }
        }
    }
}

extern "C" int64_t engine_step_size() { return sizeof(Step); }
