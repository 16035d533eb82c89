/* One token of a Llama-like model on a CPU: from the token's id to the logits of the next one.

A token needs every weight once, so its time is the time of reading them from memory. TEAL (Liu et
al., arXiv:2408.14690) skips much of that: in y = W x, column k of W matters only if x[k] is not
nearly zero. W is stored transposed, as w[K, N], so column k of W is one contiguous row of w.
`keep_rows` lists the x[k] that matter, and `add_rows` reads only their rows.

Start with `decode`, near the end: it is the forward pass, one call per stage. Every stage is cut
into n_shares shares, whose number never changes, and the workers (threads) divide them among
themselves: with fewer workers, each takes more shares. No sum depends on who computes it, so the
logits do not depend on how many workers take part. All activations are float32; weights and cache
keep their dtypes. Rows are prefetched a few rows early, so reading overlaps with arithmetic.

Python fills in the structs (cpu/step.py) and calls start_team once, step for every token, and
stop_team at the end. The file needs a C compiler that knows gnu11, and pthreads. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // dtypes
enum { NORM_NONE, NORM_HEAD, NORM_ALL };         // RMSNorm of q and k: none, each head, all heads

enum {
    AHEAD = 8,          // rows that are prefetched before they are added
    PAD = AHEAD + 4,    // entries past the end of a list of rows
    TILE = 4096,        // columns that are summed up at a time: their sums stay in the L1 cache
    HEAD_AHEAD = 8192,  // bytes of the LM head that are prefetched
    SPINS = 200,        // looks at a barrier before a worker lets others run
    IDLE_NS = 1000000,  // how long a worker waits awake for the next token
    CROWDED = 4,        // crowded tokens in a row before a team halves
    REST = 8,           // tokens for which a crowded team stays halved at first
    MOST_REST = 1024,
    GROUP = 64,         // rows of the LM head that share a lower bound
};

// ---- what Python fills in ---------------------------------------------------------------------

// A projection of few-bit weights, as cpu/packed.py lays them out: w = s (q - offset) + m.
typedef struct {
    const uint16_t *words;            // [K, n_words], the q
    const uint16_t *scale, *minimum;  // [K / group, columns], float16 times unit; minimum or NULL
    int32_t bits, group, offset, n_words, columns;
    float unit;
} Packed;

// A matrix W [N, K]: up to three projections side by side, each with its threshold.
typedef struct {
    const Packed *packed;     // one per projection, in place of w and scale; or NULL
    const void *w;            // [K, N], W transposed; of the LM head W itself, [N, K]
    const uint32_t *groups;   // of int4: [K, N / 32], a scale (low) and a minimum in bfloat16
    const float *scale;       // [N], multiplies the sums, or NULL
    const float *bias;        // [N], added next, or NULL
    const float *thresholds;  // one per projection; a negative one keeps everything
    int64_t *kept;            // one per projection: the rows read so far
    int32_t dtype, k, n, n_parts;
    int32_t ends[4];          // the last column + 1 of each projection
} Matrix;

typedef struct {
    Matrix qkv, o, gate_up, down;
    const float *attn_norm, *mlp_norm;  // [hidden], weights of RMSNorm
    const float *q_norm, *k_norm;       // [head_dim] or [heads * head_dim], or NULL
    void *keys, *values;                // the layer's KV cache, [kv_heads, context, head_dim]
    int32_t window;                     // of attention: how many tokens it sees; 0 for all
    int32_t rope;                       // which of the model's ropes
} Layer;

// What RoPE does: pair j rotates by position * frequency[j] and is multiplied by factor[j].
typedef struct {
    const float *frequency, *factor;  // [head_dim / 2]
} Rope;

// What proves that rows of the LM head cannot hold the largest logits. The formulas and the proof
// are those of lm_head.py.
typedef struct {
    const int8_t *q;          // [vocab, hidden], the rows rounded; NULL to read the whole head
    const float *scale, *error, *norm;  // [vocab] each: s, |w - s q|, |w|
    const uint8_t *seen;      // [vocab], whose logits the penalty changes, or NULL
    float penalty;
    int32_t top;              // how many of the largest logits matter
    float fill;               // the logit of a row that is not read
    float limit;              // a bound beyond +-limit proves nothing
    float largest;            // the largest |v[i]|
    // Shared: each worker writes its part, and the others read it after a barrier.
    float *upper;             // [vocab]
    float *lower;             // [groups], the largest lower bound of each group of rows
    int64_t *read;            // [n_shares], the rows of the head that each share read
    // Private: one slice per worker.
    int16_t *v;               // [n_shares, hidden], the hidden state in integers
} Bounds;

typedef struct Team Team;

typedef struct {
    int32_t n_layers, hidden, inter, heads, kv_heads, head_dim, vocab, context;
    int32_t cache_dtype, embedding_dtype, qk_norm, norms_after, n_ropes;
    int32_t largest;          // the largest K of a block's matrices
    int32_t n_shares;         // into which every stage is cut
    float eps;                // of RMSNorm
    float growth, growth_at;  // q is multiplied by 1 + growth * ln(1 + position / growth_at)
    const Layer *layers;
    const Rope *ropes;
    Matrix head;
    Bounds bounds;            // of the head's logits
    const void *embedding;    // [vocab, hidden], or else:
    const Packed *packed_embedding;
    const float *norm;        // [hidden], of the last RMSNorm
    void (*reduce)(float *y, int32_t n);  // adds up y over all ranks, or NULL
    // Shared: each worker writes its part, and the others read it after a barrier.
    float *sums[2];           // [row_shares, N], of a product and of the one after it
    float *attended;          // [heads * head_dim], what attention found
    float *mlp;               // [inter], silu(gate) * up
    float *added;             // [hidden], a sum over all ranks
    float *logits;            // [vocab]
    // Private: one slice per worker, so [n_shares, ...].
    float *x, *h, *y;         // [hidden]: the residual stream, a block's input and its output
    float *qkv;               // [N of qkv]
    float *turns;             // [n_ropes, head_dim], cosines and sines
    float *scores;            // [context]
    float *up;                // [inter]
    void *fresh;              // the token's k and v in cache_dtype, [2, kv_heads, head_dim]
    float *kept_x;            // [largest K + PAD], the kept x[k]
    int32_t *kept_k;          // [largest K + PAD], their k
    const int32_t *positions; // [context + PAD], 0, 1, 2, ...; one for all
    Team *team;
    int32_t token, position;
} Model;

// ---- numbers of every dtype become floats -----------------------------------------------------

// A vector of floats as wide as the processor's. gcc and clang know vectors without a header.
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

typedef uint16_t Shorts __attribute__((vector_size(32)));  // 16 words of few-bit weights

// Functions with `const int dtype` are written once and compiled once per dtype, without a branch.
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int bytes_of(const int dtype) {
    return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2;
}

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// float16 has 5 bits of exponent, float32 has 8. 112 is added to the exponent, except for zero and
// denormals (exponent 0), which are multiples of 2^-24, and for infinity and NaN (all ones). Masks
// choose among the three.
INLINE Floats from_float16(Words half) {
    Words exponent = half & 0x7c00, rest = (half & 0x7fff) << 13;
    Words small = (Words)(__builtin_convertvector((Ints)(half & 0x3ff), Floats) * 0x1p-24f);
    Words is_small = (Words)(exponent == 0), is_special = (Words)(exponent == 0x7c00);
    Words bits = (is_small & small) | (is_special & (rest | 0x7f800000))
                 | (~(is_small | is_special) & (rest + (112 << 23)));
    return (Floats)(bits | (half & 0x8000) << 16);
}

// Numbers i ... i + LANES - 1 of an array. Compilers make one or two instructions of each loop.
INLINE Floats get_lanes(const void *array, int64_t i, const int dtype) {
    Words words;
    Ints ints;
    switch (dtype) {
    case FLOAT32: memcpy(&words, (const float *)array + i, sizeof words); return (Floats)words;
    case INT8:
        for (int l = 0; l < LANES; l++) ints[l] = ((const int8_t *)array)[i + l];
        return __builtin_convertvector(ints, Floats);
    default:
        for (int l = 0; l < LANES; l++) words[l] = ((const uint16_t *)array)[i + l];
        return dtype == BFLOAT16 ? (Floats)(words << 16) : from_float16(words);
    }
}

// Number i.
INLINE float get(const void *array, int64_t i, const int dtype) {
    switch (dtype) {
    case FLOAT32: return ((const float *)array)[i];
    case BFLOAT16: return from_bits((uint32_t)((const uint16_t *)array)[i] << 16);
    case FLOAT16: return from_float16((Words){((const uint16_t *)array)[i]})[0];
    default: return ((const int8_t *)array)[i];
    }
}

INLINE Floats lanes_at(const float *array) {
    Floats x;
    memcpy(&x, array, sizeof x);
    return x;
}

// Rounds to nearest, ties to even, as PyTorch does.
static void put(void *array, int64_t i, float x, int dtype) {
    uint32_t bits = bits_of(x), low = bits & 0x7fffffff;
    if (dtype == FLOAT32) {
        ((float *)array)[i] = x;
    } else if (dtype == BFLOAT16) {
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)array)[i] = low > 0x7f800000 ? (bits >> 16) | 64 : rounded;  // NaN stays NaN
    } else {
        uint32_t half;
        if (low > 0x7f800000) half = 0x7e00;                       // NaN
        else if (low >= 0x477ff000) half = 0x7c00;                 // too large: infinite
        else if (low < 0x38800000) half = lrintf(from_bits(low) * 0x1p24f);  // below 2^-14
        else half = (low - (112u << 23) + 0xfff + ((low >> 13) & 1)) >> 13;
        ((uint16_t *)array)[i] = half | (bits >> 16 & 0x8000);
    }
}

// ---- TEAL -------------------------------------------------------------------------------------

// The entries of x [k] that matter: where each stands, and its value. Returns how many.
static int keep_rows(const float *x, int k, float threshold, int32_t *rows, float *values) {
    int n = 0;
    for (int i = 0; i < k; i++) {  // no branch: the next one overwrites an entry that is not kept
        rows[n] = i;
        values[n] = x[i];
        n += !(fabsf(x[i]) <= threshold);  // "not", so that a NaN is kept and stays visible
    }
    for (int i = 0; i < PAD; i++) rows[n + i] = n ? rows[n - 1] : 0;  // prefetched, never added
    return n;
}

// sums [width] += values[i] * row rows[i] of w, for each i below n: only these rows are read. A row
// has `stride` bytes. R rows at a time, so that a sum is loaded and stored once for R products.
INLINE void add_some_floats(float *restrict sums, const char *w, int64_t stride, const int32_t *rows,
                          const float *values, int n, int width, const int R, const int dtype) {
    const int size = bytes_of(dtype), line = 64 / size;  // 64 bytes are a line of the cache
    for (int i = 0; i < n; i += R) {
        const char *row[4], *later[4];
        for (int r = 0; r < R; r++) {
            row[r] = w + rows[i + r] * stride;
            later[r] = w + rows[i + r + AHEAD] * stride;
        }
        int j = 0;
        for (; j + line <= width; j += line) {
            for (int r = 0; r < R; r++) __builtin_prefetch(later[r] + j * size, 0, 2);
            for (int l = j; l < j + line; l += LANES) {
                Floats sum = lanes_at(sums + l);
                for (int r = 0; r < R; r++) sum += values[i + r] * get_lanes(row[r], l, dtype);
                memcpy(sums + l, &sum, sizeof sum);
            }
        }
        for (; j < width; j++)
            for (int r = 0; r < R; r++) sums[j] += values[i + r] * get(row[r], j, dtype);
    }
}

INLINE void add_floats_of(float *restrict sums, const char *w, int64_t stride, const int32_t *rows,
                        const float *values, int n, int width, const int dtype) {
    add_some_floats(sums, w, stride, rows, values, n & ~3, width, 4, dtype);
    int done = n & ~3;
    add_some_floats(sums, w, stride, rows + done, values + done, n - done, width, 1, dtype);
}

// As `add_some_floats`. The list must go on for AHEAD entries; their rows are only prefetched.
static void add_floats(float *sums, const void *w, int64_t stride, const int32_t *rows,
                     const float *values, int n, int width, int dtype) {
    switch (dtype) {
    case FLOAT32: add_floats_of(sums, w, stride, rows, values, n, width, FLOAT32); break;
    case BFLOAT16: add_floats_of(sums, w, stride, rows, values, n, width, BFLOAT16); break;
    case FLOAT16: add_floats_of(sums, w, stride, rows, values, n, width, FLOAT16); break;
    case INT8: add_floats_of(sums, w, stride, rows, values, n, width, INT8); break;
    }
}

// The same for int4 of quantize.py, whose 32 columns of a row share a scale s and a minimum m:
// w = s q + m. Byte j of a group's 16 holds column j in its low half and column j + 16 in its high.
INLINE void add_int4_of(float *restrict sums, const Matrix *a, int first, const int32_t *rows,
                        const float *values, int n, int width, const int R) {
    const int half = 16 / LANES;
    for (int i = 0; i < n; i += R) {
        const uint8_t *q[4], *later_q[4];
        const uint32_t *group[4], *later_group[4];
        for (int r = 0; r < R; r++) {
            int64_t at = ((int64_t)rows[i + r] * a->n + first) / 32;
            int64_t later = ((int64_t)rows[i + r + AHEAD] * a->n + first) / 32;
            q[r] = (const uint8_t *)a->w + 16 * at;
            later_q[r] = (const uint8_t *)a->w + 16 * later;
            group[r] = a->groups + at;
            later_group[r] = a->groups + later;
        }
        for (int64_t g = 0; g < width / 32; g++) {
            Floats sum[2 * half];
            float minimum = 0;
            UNROLL for (int l = 0; l < 2 * half; l++) sum[l] = lanes_at(sums + 32 * g + l * LANES);
            for (int r = 0; g % 4 == 0 && r < R; r++) {  // lines of 64 bytes
                __builtin_prefetch(later_q[r] + 16 * g, 0, 2);
                if (g % 16 == 0) __builtin_prefetch(later_group[r] + g, 0, 2);
            }
            UNROLL for (int r = 0; r < R; r++) {
                float scale = values[i + r] * from_bits(group[r][g] << 16);
                minimum += values[i + r] * from_bits(group[r][g] & 0xffff0000);
                UNROLL for (int l = 0; l < half; l++) {
                    Ints bytes;
                    for (int b = 0; b < LANES; b++) bytes[b] = q[r][16 * g + l * LANES + b];
                    sum[l] += scale * __builtin_convertvector(bytes & 15, Floats);
                    sum[half + l] += scale * __builtin_convertvector(bytes >> 4, Floats);
                }
            }
            UNROLL for (int l = 0; l < 2 * half; l++) {
                sum[l] += minimum;
                memcpy(sums + 32 * g + l * LANES, &sum[l], sizeof sum[l]);
            }
        }
    }
}

static void add_int4(float *sums, const Matrix *a, int first, const int32_t *rows,
                     const float *values, int n, int width) {
    int done = n & ~3;
    add_int4_of(sums, a, first, rows, values, done, width, 4);
    add_int4_of(sums, a, first, rows + done, values + done, n - done, width, 1);
}

// ---- few-bit weights: TEAL in integers --------------------------------------------------------
//
// Skip this section at first: the rest of the file does not depend on it. A weight is
// s (q - offset) + m, with an integer q of few bits. A *group* of 16 or 32 inputs shares one row of
// scales s and one of minimums m. In each group, the kept x are rounded to multiples of one step,
// so that sums of x q are sums of integers, modulo 2^16.
//
// A word of 16 bits holds several q, its *fields*. With 4 bits, w = a + 16 b + 256 c + 4096 d. Let
// t[i] be the sum of x * (w >> 4 i) over the kept rows. Then t[0] - 16 t[1] is the sum of x a,
// t[1] - 16 t[2] that of x b, and so on. A vector has 16 words, so a shift, a product and an
// addition serve 16 weights. A q of 8 bits is two fields of 4. A *block* is the columns that one or
// three vectors of words hold (cpu/packed.py); it needs block_sums sums t.
//
// The sum of |x| / step, times the largest field `most`, must stay below 2^16, and rounding adds up
// to 1/2 for each of m kept x: step = sum |x| / (65535 / most - m / 2). The error of y[n] is at
// most the sum over groups of step / 2 * sum |w[k, n]| over the group's kept k. With 4 bits and 32
// random x, an x rounds to one part in 600, root mean square.

INLINE int block_columns(const int bits) {
    return bits == 4 ? 64 : bits == 5 ? 48 : bits == 6 ? 128 : 32;
}

INLINE int block_words(const int bits) { return bits == 6 ? 48 : 16; }

INLINE int block_sums(const int bits) { return bits == 5 ? 3 : bits == 6 ? 10 : 4; }

INLINE Shorts words_at(const uint16_t *array) {
    Shorts words;
    memcpy(&words, array, sizeof words);
    return words;
}

// A block's words, each shifted so that another of its fields stands lowest.
INLINE void shift_words(const uint16_t *words, Shorts *shifted, const int bits) {
    const int width = bits == 8 ? 4 : bits, n = bits == 6 ? 3 : block_sums(bits);
    UNROLL for (int w = 0; w < block_words(bits) / 16; w++)
        UNROLL for (int s = 0; s < n; s++)
            shifted[n * w + s] = words_at(words + 16 * w) >> width * s;
    if (bits == 6) shifted[9] = words_at(words + 32) >> 14;
}

// sums [blocks, block_sums] += x[i] * (shifted words of row rows[i]), for each i below n, four rows
// at a time: x and the list go on to the next multiple of four.
INLINE void add_words(Shorts *restrict sums, const uint16_t *words, int64_t stride,
                      const int32_t *rows, const int16_t *x, int n, int n_blocks, const int bits) {
    const int n_words = block_words(bits), n_sums = block_sums(bits);
    for (int i = 0; i < n; i += 4) {
        const uint16_t *row[4], *later[4];
        for (int r = 0; r < 4; r++) {
            row[r] = words + rows[i + r] * stride;
            later[r] = words + rows[i + r + AHEAD] * stride;
        }
        for (int b = 0; b < n_blocks; b++) {
            Shorts sum[10], shifted[10];
            UNROLL for (int s = 0; s < n_sums; s++) sum[s] = sums[b * n_sums + s];
            UNROLL for (int r = 0; r < 4; r++) {
                for (int j = 0; j < n_words; j += 32)
                    __builtin_prefetch(later[r] + b * n_words + j, 0, 2);
                shift_words(row[r] + b * n_words, shifted, bits);
                UNROLL for (int s = 0; s < n_sums; s++) sum[s] += shifted[s] * (uint16_t)x[i + r];
            }
            UNROLL for (int s = 0; s < n_sums; s++) sums[b * n_sums + s] = sum[s];
        }
    }
}

// The sums of a block's fields, modulo 2^16, from those of its shifted words.
INLINE void split_fields(const Shorts *t, Shorts *field, const int bits) {
    if (bits == 6) {
        UNROLL for (int w = 0; w < 3; w++) {
            field[2 * w] = t[3 * w] - 64 * t[3 * w + 1];
            field[2 * w + 1] = t[3 * w + 1] - 64 * t[3 * w + 2];
        }
        field[6] = t[2] + 16 * (t[8] - 4 * t[9]);  // the lower four bits and the upper two
        field[7] = t[5] + 16 * t[9];
    } else {
        const int n = block_sums(bits);
        const uint16_t next = bits == 5 ? 32 : 16;
        UNROLL for (int s = 0; s < n - 1; s++) field[s] = t[s] - next * t[s + 1];
        field[n - 1] = t[n - 1];
    }
}

// float16 -> float32 by moving bits. The exponent keeps float16's bias, so this is 2^-112 times the
// number, and `unit` in add_packed_of makes up for it. The mask clears copies of the sign bit. Not
// for denormals, infinities or NaN.
INLINE Floats small_halves(const uint16_t *array) {
    Ints halves;
    for (int l = 0; l < LANES; l++) halves[l] = array[l];
    return (Floats)((Words)((halves << 16) >> 3) & 0x8fffe000);
}

// Numbers of a block's columns j ... j + LANES - 1, from its fields; `lift` makes them positive.
INLINE Floats columns_at(const Shorts *field, int j, uint16_t lift, const int bits) {
    Shorts sum = field[bits == 8 ? j / 16 * 2 : j / 16] + lift;
    Ints low, high = {0};
    for (int l = 0; l < LANES; l++) low[l] = sum[j % 16 + l];
    if (bits == 8) {  // two fields of four bits each
        sum = field[j / 16 * 2 + 1] + lift;
        for (int l = 0; l < LANES; l++) high[l] = sum[j % 16 + l];
    }
    return __builtin_convertvector(low + 16 * high, Floats);
}

// Adds a group's part to y, for all columns: s * (sum * step - base) + m * x; s and m stand at `at`
// of w. x has signs, so a field's sum may be negative, but it is known modulo 2^16 only. Adding
// `lift`, as much as negative x can subtract, makes it positive; base subtracts it again, and the
// offset. (8 bits: low + 16 * high, both lifted, so 17 lifts.)
INLINE void add_group(float *restrict y, const Shorts *sums, const Packed *w, int64_t at,
                      int n_blocks, float step, float base, float x, uint16_t lift, const int bits) {
    const int n_sums = block_sums(bits), width = block_columns(bits);
    for (int b = 0; b < n_blocks; b++, y += width, at += width, sums += n_sums) {
        Shorts field[8];
        split_fields(sums, field, bits);
        for (int j = 0; j < width; j += 32) {
            __builtin_prefetch(w->scale + at + w->columns + j, 0, 2);
            if (w->minimum) __builtin_prefetch(w->minimum + at + w->columns + j, 0, 2);
        }
        UNROLL for (int j = 0; j < width; j += LANES) {
            Floats q = columns_at(field, j, lift, bits) * step - base;
            Floats sum = lanes_at(y + j) + small_halves(w->scale + at + j) * q;
            if (w->minimum) sum += small_halves(w->minimum + at + j) * x;
            memcpy(y + j, &sum, sizeof sum);
        }
    }
}

// y [n_blocks of columns] += x[i] * row rows[i] of w from block `first` on, for each i below n.
INLINE void add_packed_of(float *restrict y, const Packed *w, int first, int n_blocks,
                          const int32_t *rows, const float *x, int n, const int bits) {
    const int most = bits == 8 ? 15 : (1 << bits) - 1, n_sums = block_sums(bits);
    const uint16_t *words = w->words + (int64_t)first * block_words(bits);
    Shorts sums[TILE / 8];
    for (int i = 0, m; i < n; i += m) {
        int group = rows[i] / w->group, all = 0, below = 0;
        int16_t rounded[32 + 4] = {0};
        float total = 0;
        for (m = 0; i + m < n && rows[i + m] < (group + 1) * w->group; m++)
            total += fabsf(x[i + m]);
        float step = total / (65535 / most - m / 2), inverse = total > 0 ? 1 / step : 0;
        if (m == 1) {  // nothing to add up, so nothing to round
            step = x[i];
            all = 1;
            for (int b = 0; b < n_blocks; b++)
                shift_words(words + rows[i] * (int64_t)w->n_words + b * block_words(bits),
                            sums + b * n_sums, bits);
        } else {
            for (int r = 0; r < m; r++) {
                rounded[r] = lrintf(x[i + r] * inverse);
                all += rounded[r];
                below -= rounded[r] < 0 ? rounded[r] : 0;
            }
            memset(sums, 0, n_blocks * n_sums * sizeof *sums);
            add_words(sums, words, w->n_words, rows + i, rounded, m, n_blocks, bits);
        }
        int64_t at = (int64_t)group * w->columns + first * block_columns(bits);
        float lift = most * below, unit = step * w->unit * 0x1p112f;
        float base = unit * ((bits == 8 ? 17 : 1) * lift + w->offset * all);
        add_group(y, sums, w, at, n_blocks, unit, base, unit * all, lift, bits);
    }
}

static void add_packed(float *y, const Packed *w, int first, int n_blocks, const int32_t *rows,
                       const float *x, int n) {
    switch (w->bits) {
    case 4: add_packed_of(y, w, first, n_blocks, rows, x, n, 4); break;
    case 5: add_packed_of(y, w, first, n_blocks, rows, x, n, 5); break;
    case 6: add_packed_of(y, w, first, n_blocks, rows, x, n, 6); break;
    case 8: add_packed_of(y, w, first, n_blocks, rows, x, n, 8); break;
    }
}

// The shares of a product form a grid. Its row shares, four at most, split the list of kept rows:
// each has sums of its own, and `finish` adds them up. Its column shares split the columns.
static int row_shares(const Model *m) {
    int rows = m->n_shares < 4 ? m->n_shares : 4;
    while (m->n_shares % rows) rows--;
    return rows;
}

// The first column of column share c of `of`: a multiple of a block, so that two shares never write
// to the same line of the cache.
static int first_column(int n, int c, int of, int block) {
    return c == of ? n : (int64_t)n * c / of / block * block;
}

static int block_of(const Matrix *a, int part) {
    return a->packed ? block_columns(a->packed[part].bits) : 64;
}

// y [whole blocks] += x[i] * row rows[i] of a, for each i below n. Only some columns of one of its
// projections are added up: `width` from `first` on, where a block begins.
static void add_rows(float *y, const Matrix *a, int part, int first, int width, const int32_t *rows,
                     const float *x, int n) {
    if (a->packed) {
        int block = block_of(a, part);
        add_packed(y, &a->packed[part], first / block, (width + block - 1) / block, rows, x, n);
        return;
    }
    first += part ? a->ends[part - 1] : 0;
    if (a->dtype == INT4)
        add_int4(y, a, first, rows, x, n, width);
    else
        add_floats(y, (const char *)a->w + (int64_t)first * bytes_of(a->dtype),
                   (int64_t)a->n * bytes_of(a->dtype), rows, x, n, width, a->dtype);
}

// A share of x [K] times a matrix, into the sums of its row share.
static void product(const Model *m, const Matrix *a, const float *x, int worker, int share,
                    float *sums) {
    int n_rows = row_shares(m), n_columns = m->n_shares / n_rows, n = 0;
    int r = share % n_rows, c = share / n_rows;
    int32_t *rows = m->kept_k + (int64_t)worker * (m->largest + PAD);
    float *values = m->kept_x + (int64_t)worker * (m->largest + PAD), y[TILE];
    sums += (int64_t)r * a->n;
    for (int part = 0, start = 0; part < a->n_parts; start = a->ends[part++]) {
        if (part == 0 || a->thresholds[part] != a->thresholds[part - 1])
            n = keep_rows(x, a->k, a->thresholds[part], rows, values);
        if (share == 0) a->kept[part] += n;
        int top = n * (int64_t)r / n_rows, bottom = n * (int64_t)(r + 1) / n_rows;
        int size = a->ends[part] - start, block = block_of(a, part);
        int end = first_column(size, c + 1, n_columns, block);
        for (int j = first_column(size, c, n_columns, block), width; j < end; j += width) {
            width = end - j < TILE / block * block ? end - j : TILE / block * block;
            memset(y, 0, sizeof y);
            add_rows(y, a, part, j, width, rows + top, values + top, bottom - top);
            memcpy(sums + start + j, y, width * sizeof *y);
        }
    }
}

// Columns of a projection that become floats, and the rows of them that a thread takes.
typedef struct {
    const Matrix *a;
    float *y;
    int part, first, width, stride, top, bottom;
} Piece;

static void *unpack_rows(void *argument) {
    const Piece *p = argument;
    const float one = 1;
    for (int k = p->top; k < p->bottom; k++) {
        int32_t rows[PAD];
        for (int i = 0; i < PAD; i++) rows[i] = k;
        memset(p->y + (int64_t)k * p->stride, 0, p->stride * sizeof *p->y);
        add_rows(p->y + (int64_t)k * p->stride, p->a, p->part, p->first, p->width, rows, &one, 1);
    }
    return NULL;
}

// Columns first ... first + width - 1 of a projection as floats, y [K, stride], whole blocks.
void unpack(const Matrix *a, int32_t part, int32_t first, int32_t width, int32_t stride, float *y,
            int32_t n_threads) {
    Piece pieces[64];
    pthread_t threads[64];
    for (int t = 0; t < n_threads; t++) {
        int top = (int64_t)a->k * t / n_threads, bottom = (int64_t)a->k * (t + 1) / n_threads;
        pieces[t] = (Piece){a, y, part, first, width, stride, top, bottom};
        if (t == n_threads - 1 || pthread_create(&threads[t], NULL, unpack_rows, &pieces[t])) {
            pieces[t].bottom = a->k;  // the last rows are the caller's
            n_threads = t;
        }
    }
    unpack_rows(&pieces[n_threads]);
    for (int t = 0; t < n_threads; t++) pthread_join(threads[t], NULL);
}

// Columns first ... first + n - 1 of a finished product, into y [n].
static void finish(const Model *m, const Matrix *a, const float *sums, int first, int n, float *y) {
    int n_rows = row_shares(m);
    memcpy(y, sums + first, n * sizeof *y);
    for (int r = 1; r < n_rows; r++)
        for (int j = 0; j < n; j++) y[j] += sums[(int64_t)r * a->n + first + j];
    if (a->scale)
        for (int j = 0; j < n; j++) y[j] *= a->scale[first + j];
    if (a->bias)
        for (int j = 0; j < n; j++) y[j] += a->bias[first + j];
}

// ---- the small parts of a block ---------------------------------------------------------------

// Four sums side by side, because each addition waits for the one before it.
INLINE float dot_of(const float *x, const void *row, int n, const int dtype) {
    Floats sums[4] = {0};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int s = 0; s < 4; s++)
            sums[s] += lanes_at(x + i + s * LANES) * get_lanes(row, i + s * LANES, dtype);
    Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int l = 0; l < LANES; l++) total += sum[l];
    for (; i < n; i++) total += x[i] * get(row, i, dtype);
    return total;
}

static float dot(const float *x, const void *row, int n, int dtype) {
    switch (dtype) {
    case FLOAT32: return dot_of(x, row, n, FLOAT32);
    case BFLOAT16: return dot_of(x, row, n, BFLOAT16);
    case FLOAT16: return dot_of(x, row, n, FLOAT16);
    default: return dot_of(x, row, n, INT8);
    }
}

// y = x [n], scaled to a root mean square of 1, times weight. y may be x.
static void rms_norm(float *y, const float *x, const float *weight, int n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n, FLOAT32) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Rotates the pairs (j, j + half) of a head.
static void rotate(float *restrict head, const float *restrict cosine, const float *restrict sine,
                   int half) {
    for (int j = 0; j < half; j++) {
        float a = head[j], b = head[j + half];
        head[j] = a * cosine[j] - b * sine[j];
        head[j + half] = b * cosine[j] + a * sine[j];
    }
}

// e^x = 2^n e^r with |r| <= ln 2 / 2: relative error 2e-7. Compilers vectorise it, but not expf.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the lowest bits are round(x / ln 2)
    uint32_t power = bits_of(n) << 23;
    n -= 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f
              + r / 720)))));
    return x == x ? from_bits(bits_of(p) + power) : x;
}

// ---- workers ----------------------------------------------------------------------------------

// Workers sleep between tokens and meet at a barrier between stages. A team notices when other
// programs take its processors: then workers wait long for one that does not run, and fewer
// workers are faster. So the team halves, and tries again later.
struct Team {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *threads;
    Model *model;
    int32_t size, active;         // all workers; the first `active` of them take part
    int64_t waited;               // nanoseconds in this token, of all workers
    int64_t tokens, until;        // tokens so far; at which number all workers are tried again
    int32_t crowded;              // tokens in a row with long waits
    int32_t calm;                 // tokens since `active` last changed
    int32_t rest;                 // tokens for which a halved team stays halved
    int64_t job;                  // the number of the token * 256 + active; -1 to end
    char line0[64];               // each counter below has a line of the cache to itself
    int32_t arrived;
    char line1[64];
    int32_t generation;
    char line2[64];
};

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline void pause_a_moment(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits until all active workers have come here. The last to arrive resets `arrived` and opens the
// barrier by raising `generation`, which the others watch. RELEASE and ACQUIRE: what a worker wrote
// before the barrier, every worker sees after it.
static void barrier(Team *team) {
    int32_t active = team->active;  // read before arriving: after the last barrier it may change
    if (active == 1) return;
    int32_t now = __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == active) {
        __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->generation, now + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) != now) return;
        pause_a_moment();
    }
    int64_t start = nanoseconds();
    while (__atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == now) sched_yield();
    __atomic_add_fetch(&team->waited, nanoseconds() - start, __ATOMIC_RELAXED);
}

// ---- the stages of a token: a worker's part of each -------------------------------------------

// The token's row of the embedding. Every worker keeps the whole residual stream x [hidden].
static void embed(const Model *m, float *x) {
    if (m->packed_embedding) {
        const Packed *w = m->packed_embedding;
        int width = block_columns(w->bits);
        float block[128];
        const float one = 1;
        for (int32_t i = 0; i < m->hidden; i++) {
            memset(block, 0, sizeof block);
            add_packed(block, w, m->token / width, 1, &i, &one, 1);
            x[i] = block[m->token % width];
        }
        return;
    }
    int64_t at = (int64_t)m->token * m->hidden;
    for (int i = 0; i < m->hidden; i++) x[i] = get(m->embedding, at + i, m->embedding_dtype);
}

// The cosines and sines by which heads rotate at this position, of every kind of RoPE.
static void turn(const Model *m, float *turns) {
    int half = m->head_dim / 2;
    for (int kind = 0; kind < m->n_ropes; kind++, turns += m->head_dim)
        for (int j = 0; j < half; j++) {
            const Rope *rope = &m->ropes[kind];
            turns[j] = cosf(m->position * rope->frequency[j]) * rope->factor[j];
            turns[half + j] = sinf(m->position * rope->frequency[j]) * rope->factor[j];
        }
}

// The q|k|v that the shares summed up -> q, k, v with their norms, RoPE and growth.
static void prepare_heads(const Model *m, const Layer *layer, const float *turns, float *qkv) {
    int d = m->head_dim, heads = m->heads, kv_heads = m->kv_heads;
    const float *cosine = turns + layer->rope * d, *sine = cosine + d / 2;
    float *k = qkv + heads * d;
    finish(m, &layer->qkv, m->sums[0], 0, layer->qkv.n, qkv);
    if (m->qk_norm == NORM_ALL) {
        rms_norm(qkv, qkv, layer->q_norm, heads * d, m->eps);
        rms_norm(k, k, layer->k_norm, kv_heads * d, m->eps);
    }
    float growth = 1 + m->growth * logf(1 + floorf(m->position / m->growth_at));
    for (int head = 0; head < heads + kv_heads; head++) {
        float *x = qkv + head * d;
        if (m->qk_norm == NORM_HEAD)
            rms_norm(x, x, head < heads ? layer->q_norm : layer->k_norm, d, m->eps);
        rotate(x, cosine, sine, d / 2);
        if (head < heads)
            for (int j = 0; j < d; j++) x[j] *= growth;
    }
}

// softmax(q K^T / sqrt(head_dim)) V of one head, over the positions first ... m->position; keys and
// values are the head's cache, k and v those of the token, which may not stand there yet.
static void attend(const Model *m, const float *q, const char *keys, const char *values,
                   const char *k, const char *v, int first, float *p, float *y) {
    int d = m->head_dim, n = m->position - first, dtype = m->cache_dtype;
    int64_t stride = (int64_t)d * bytes_of(dtype);
    float scale = 1 / sqrtf(d), most = -INFINITY, total = 0;
    for (int s = 0; s < n; s++) p[s] = dot(q, keys + (first + s) * stride, d, dtype) * scale;
    p[n] = dot(q, k, d, dtype) * scale;
    for (int s = 0; s <= n; s++) most = p[s] > most ? p[s] : most;
    for (int s = 0; s <= n; s++) p[s] = exponential(p[s] - most);
    for (int s = 0; s <= n; s++) total += p[s];
    memset(y, 0, d * sizeof *y);
    add_floats(y, values + first * stride, stride, m->positions, p, n, d, dtype);
    add_floats(y, v, stride, m->positions, p + n, 1, d, dtype);
    for (int j = 0; j < d; j++) y[j] /= total;
}

// The share's heads: attention, and the token's k and v into the cache.
static void attention(const Model *m, const Layer *layer, const float *qkv, char *fresh, float *p,
                      int share) {
    int d = m->head_dim, kv_heads = m->kv_heads, group = m->heads / kv_heads, of = m->n_shares;
    int64_t size = bytes_of(m->cache_dtype), head_bytes = m->context * d * size;
    const float *k = qkv + m->heads * d;
    for (int i = 0; i < 2 * kv_heads * d; i++) put(fresh, i, k[i], m->cache_dtype);
    char *fresh_v = fresh + kv_heads * d * size;
    for (int kv = kv_heads * share / of; kv < kv_heads * (share + 1) / of; kv++) {
        int64_t at = kv * head_bytes + m->position * d * size;
        memcpy((char *)layer->keys + at, fresh + kv * d * size, d * size);
        memcpy((char *)layer->values + at, fresh_v + kv * d * size, d * size);
    }
    int first = layer->window && layer->window <= m->position ? m->position + 1 - layer->window : 0;
    for (int head = m->heads * share / of; head < m->heads * (share + 1) / of; head++) {
        int kv = head / group;
        attend(m, qkv + head * d, (const char *)layer->keys + kv * head_bytes,
               (const char *)layer->values + kv * head_bytes, fresh + kv * d * size,
               fresh_v + kv * d * size, first, p, m->attended + head * d);
    }
}

// SwiGLU: silu(gate) decides how much of each of up's channels goes on to down.
static void swiglu(const Model *m, const Matrix *gate_up, float *y, int share) {
    int first = first_column(m->inter, share, m->n_shares, 64);
    int n = first_column(m->inter, share + 1, m->n_shares, 64) - first;
    float *restrict gate = m->mlp + first, *restrict up = y;
    finish(m, gate_up, m->sums[0], first, n, gate);
    finish(m, gate_up, m->sums[0], m->inter + first, n, up);
    for (int j = 0; j < n; j++) gate[j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
}

// Adds a finished product to the residual stream, after a norm where the model has it there.
static void add_to_stream(const Model *m, const Matrix *a, const float *norm, int worker, float *x,
                          float *y) {
    if (m->reduce) {  // every rank has a part of the sum
        if (worker == 0) {
            finish(m, a, m->sums[1], 0, m->hidden, m->added);
            m->reduce(m->added, m->hidden);
        }
        barrier(m->team);
        memcpy(y, m->added, m->hidden * sizeof *y);
    } else {
        finish(m, a, m->sums[1], 0, m->hidden, y);
    }
    if (m->norms_after) rms_norm(y, y, norm, m->hidden, m->eps);
    for (int i = 0; i < m->hidden; i++) x[i] += y[i];
}

// ---- the LM head ------------------------------------------------------------------------------

// The hidden state h is about t * v, with integers v. In units of t, norm is |h|, and rest is
// |h - t v| with a margin for rounding. lm_head.py derives the bounds from them.
typedef struct { const int16_t *v; float t, norm, rest; } Rounded;

static Rounded round_state(const Model *m, const float *h, int worker, float *exact) {
    int k = m->hidden;
    int16_t *v = m->bounds.v + (int64_t)worker * k;
    float most = 0;
    for (int i = 0; i < k; i++) most = fabsf(h[i]) > most ? fabsf(h[i]) : most;
    float t = most / m->bounds.largest;
    for (int i = 0; i < k; i++) exact[i] = h[i] / t;
    float norm = sqrtf(dot(exact, exact, k, FLOAT32));
    float grown = norm * (127 * sqrtf(k) / 0x1p30f);  // so that no sum of q v reaches 2^31
    grown = grown > 1 ? grown : 1;
    for (int i = 0; i < k; i++) {
        float z = exact[i] / grown, whole = floorf(z + 0.5f);
        v[i] = fabsf(whole) <= INT16_MAX ? whole : 0;  // otherwise norm is NaN: no bound holds
        exact[i] = z - whole;
    }
    float rest = sqrtf(dot(exact, exact, k, FLOAT32));
    norm /= grown;
    return (Rounded){v, t * grown, norm, rest + norm * (k * 0x1p-23f + 0x1p-19f)};
}

static int32_t integer_dot(const int8_t *q, const int16_t *v, int k) {
    int32_t sum = 0;
    for (int i = 0; i < k; i++) sum += q[i] * v[i];
    return sum;
}

// The share's upper bounds, and the lower bounds of its groups: infinite if a row proves nothing,
// and then all rows are read. Shares begin at multiples of GROUP, so no group lies in two of them.
static void bound(const Model *m, Rounded h, int share) {
    const Bounds *b = &m->bounds;
    int k = m->hidden, first = first_column(m->vocab, share, m->n_shares, GROUP);
    int end = first_column(m->vocab, share + 1, m->n_shares, GROUP);
    for (int i = first; i < end; i++) {
        const int8_t *q = b->q + (int64_t)i * k;
        for (int j = 0; j < k; j += 64) __builtin_prefetch(q + HEAD_AHEAD + j, 0, 2);
        float y = integer_dot(q, h.v, k) * (h.t * b->scale[i]);
        float radius = h.t * (b->error[i] * h.norm + b->norm[i] * h.rest) * (1 + 0x1p-8f) + 1e-28f;
        float lower = y - radius, upper = y + radius;
        if (b->seen && b->seen[i]) {
            lower = lower < 0 ? lower * b->penalty : lower / b->penalty;
            upper = upper < 0 ? upper * b->penalty : upper / b->penalty;
        }
        if (!(lower > -b->limit && upper < b->limit)) lower = INFINITY;  // NaN, too
        float *group = b->lower + i / GROUP;
        *group = i % GROUP && *group > lower ? *group : lower;
        b->upper[i] = upper;
    }
}

// What an upper bound must reach: the top-th largest of the groups' lower bounds, so that at least
// `top` logits reach it. One bound per group can only make it lower than one per row would.
static float least_upper(const Model *m) {
    const Bounds *b = &m->bounds;
    int groups = (m->vocab + GROUP - 1) / GROUP;
    float largest = -INFINITY;
    for (int g = 0; g < groups; g++) largest = b->lower[g] > largest ? b->lower[g] : largest;
    if (largest == INFINITY || b->top > groups) return -INFINITY;
    if (b->top == 1) return largest;
    // As integers, floats keep their order if the bits of negative ones are inverted.
    int32_t reached = INT32_MIN;
    for (int bit = 31; bit >= 0; bit--) {  // the largest integer that `top` of them reach
        int32_t more = (int32_t)((uint32_t)reached + (1u << bit));
        int n = 0;
        for (int g = 0; g < groups; g++) {
            int32_t order = bits_of(b->lower[g]);
            order ^= order >> 31 & INT32_MAX;
            n += order >= more;
        }
        if (n >= b->top) reached = more;
    }
    return from_bits(reached ^ (reached >> 31 & INT32_MAX));
}

// The share's logits, one row of the head each, where the upper bound reaches `least`.
static void logits(const Model *m, const float *x, float least, int share) {
    const Matrix *head = &m->head;
    const Bounds *b = &m->bounds;
    int64_t row_bytes = (int64_t)head->k * bytes_of(head->dtype), read = 0;
    int first = first_column(m->vocab, share, m->n_shares, GROUP);
    int end = first_column(m->vocab, share + 1, m->n_shares, GROUP);
    if (head->packed) {
        finish(m, head, m->sums[0], first, end - first, m->logits + first);
        return;
    }
    for (int i = first; i < end; i++) {
        if (b->q && b->upper[i] < least) {
            m->logits[i] = b->fill;
            continue;
        }
        const char *row = (const char *)head->w + i * row_bytes;
        if (least == -INFINITY)  // all rows
            for (int64_t j = 0; j < row_bytes; j += 64)
                __builtin_prefetch(row + HEAD_AHEAD + j, 0, 2);
        m->logits[i] = dot(x, row, head->k, head->dtype) * (head->scale ? head->scale[i] : 1);
        read++;
    }
    if (b->q) b->read[share] = read;
}

// ---- the forward pass -------------------------------------------------------------------------

// A loop over the worker's shares of a stage.
#define FOR_SHARES for (int share = worker; share < m->n_shares; share += m->team->active)

// One worker's part of a token. All workers run this; a barrier stands where one needs what the
// others computed. sums[0] and sums[1] alternate, so that a worker may be a product ahead.
static void decode(const Model *m, int worker) {
    Team *team = m->team;
    int64_t hidden = m->hidden, id = worker;
    float *x = m->x + id * hidden, *h = m->h + id * hidden, *y = m->y + id * hidden;
    float *qkv = m->qkv + id * m->layers[0].qkv.n;
    float *turns = m->turns + id * m->n_ropes * m->head_dim;
    float *scores = m->scores + id * m->context, *up = m->up + id * m->inter;
    char *fresh = (char *)m->fresh + id * 2 * m->kv_heads * m->head_dim * bytes_of(m->cache_dtype);

    embed(m, x);
    turn(m, turns);
    for (const Layer *layer = m->layers; layer < m->layers + m->n_layers; layer++) {
        // Attention reads the stream through a norm ...
        const float *in = m->norms_after ? x : h;
        if (!m->norms_after) rms_norm(h, x, layer->attn_norm, hidden, m->eps);
        FOR_SHARES product(m, &layer->qkv, in, worker, share, m->sums[0]);
        barrier(team);
        prepare_heads(m, layer, turns, qkv);
        FOR_SHARES attention(m, layer, qkv, fresh, scores, share);
        barrier(team);
        FOR_SHARES product(m, &layer->o, m->attended, worker, share, m->sums[1]);
        barrier(team);
        add_to_stream(m, &layer->o, layer->attn_norm, worker, x, y);  // ... and adds to it.
        // So does the MLP.
        if (!m->norms_after) rms_norm(h, x, layer->mlp_norm, hidden, m->eps);
        FOR_SHARES product(m, &layer->gate_up, in, worker, share, m->sums[0]);
        barrier(team);
        FOR_SHARES swiglu(m, &layer->gate_up, up, share);
        barrier(team);
        FOR_SHARES product(m, &layer->down, m->mlp, worker, share, m->sums[1]);
        barrier(team);
        add_to_stream(m, &layer->down, layer->mlp_norm, worker, x, y);
    }
    rms_norm(h, x, m->norm, hidden, m->eps);
    float least = -INFINITY;
    if (m->bounds.q) {
        Rounded rounded = round_state(m, h, worker, y);
        FOR_SHARES bound(m, rounded, share);
        barrier(team);
        least = least_upper(m);
    }
    if (m->head.packed) {
        FOR_SHARES product(m, &m->head, h, worker, share, m->sums[0]);
        barrier(team);
    }
    FOR_SHARES logits(m, h, least, share);
    barrier(team);
}

// ---- what Python calls ------------------------------------------------------------------------

// Denormal floats, below 1e-38, count as zeros: some processors need 100 times as long for them.
static void flush_denormals(void) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | 1 << 24));
#endif
}

// The next token's number: awake for a moment if the last token needed this worker, else asleep.
static int64_t next_job(Team *team, int64_t last, int awake) {
    int64_t job, start = nanoseconds();
    do {
        job = __atomic_load_n(&team->job, __ATOMIC_ACQUIRE);
        if (job != last) return job;
        sched_yield();
    } while (awake && nanoseconds() - start < IDLE_NS);
    pthread_mutex_lock(&team->mutex);
    while ((job = __atomic_load_n(&team->job, __ATOMIC_ACQUIRE)) == last)
        pthread_cond_wait(&team->wake, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
    return job;
}

static void give_job(Team *team, int64_t job) {
    pthread_mutex_lock(&team->mutex);
    __atomic_store_n(&team->job, job, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
}

typedef struct { Model *m; int worker; } Start;

static void *work(void *argument) {
    Start start = *(Start *)argument;
    free(argument);
    flush_denormals();
    int active = 0;
    for (int64_t job = 0; (job = next_job(start.m->team, job, active)) >= 0;) {
        active = start.worker < (job & 255);
        if (active) decode(start.m, start.worker);
    }
    return NULL;
}

// Ends the workers of start_team.
void stop_team(Model *m) {
    Team *team = m->team;
    give_job(team, -1);
    for (int i = 1; i < team->size; i++) pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->mutex);
    free(team->threads);
    free(team);
    m->team = NULL;
}

// Starts all workers but the first, which is the caller of `step`. Returns how many there are.
int start_team(Model *m) {
    Team *team = m->team = calloc(1, sizeof *team);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
    team->threads = calloc(m->n_shares, sizeof *team->threads);
    for (team->size = 1; team->size < m->n_shares; team->size++) {
        Start *start = malloc(sizeof *start);
        *start = (Start){m, team->size};
        if (pthread_create(&team->threads[team->size], NULL, work, start)) {
            free(start);
            break;  // the workers there are take all shares
        }
    }
    team->active = team->size;
    team->calm = team->rest = REST;
    return team->size;
}

// After a token: halves the team if its workers waited an eighth of the time, on average, in four
// tokens in a row. After `rest` tokens, all take part again; if that soon makes them wait, the next
// rest is twice as long.
static void adapt(Team *team, int64_t elapsed) {
    int64_t waited = __atomic_exchange_n(&team->waited, 0, __ATOMIC_RELAXED);
    int crowded = waited * 8 > elapsed * team->active;
    team->crowded = crowded ? team->crowded + 1 : 0;
    if (team->crowded == CROWDED || (crowded && team->calm == 0)) {
        team->active = (team->active + 1) / 2;
        team->rest = team->calm < REST ? 2 * team->rest : REST;
        if (team->rest > MOST_REST) team->rest = MOST_REST;
        team->calm = team->crowded = 0;
        team->until = team->tokens + team->rest;
    } else if (team->active < team->size && team->tokens >= team->until) {
        team->active = team->size;
        team->calm = 0;  // one crowded token ends this try
    } else {
        team->calm++;
    }
    team->tokens++;
}

// Reads `token`, which stands at `position`, with what the cache holds: fills m->logits.
void step(Model *m, int32_t token, int32_t position) {
    Team *team = m->team;
    m->token = token;
    m->position = position;
#if defined(__x86_64__)
    unsigned mode = __builtin_ia32_stmxcsr();
#endif
    flush_denormals();
    int64_t start = nanoseconds();
    give_job(team, ((team->job >> 8) + 1) << 8 | team->active);
    decode(m, 0);
    if (team->size > 1) adapt(team, nanoseconds() - start);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(mode);
#endif
}
