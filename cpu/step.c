/* One token of a Llama-like model on a CPU: from the token's id to the logits of the next one.

A token needs every weight once, so its time is the time of reading them from memory. TEAL (Liu et
al., arXiv:2408.14690) skips much of that: in y = W x, column k of W matters only if x[k] is not
nearly zero. W is stored transposed, as w[K, N], so column k of W is one contiguous row of w.
`keep_rows` lists the x[k] that matter, and `add_floats` reads only their rows. All activations are
float32; weights and cache keep their dtypes.

The course reads from here to `decode`, the first half of the file: sums of rows, the model, a
product, the parts of a block, the workers (threads), one token. Appendices follow, each by itself:
numbers of every dtype, weights of few bits, bounds of the LM head, the workers' sleep.

Python fills in the structs (cpu/step.py) and calls start_team once, step for every token, and
stop_team at the end (appendix D). The file needs a C compiler that knows gnu11, and pthreads. */

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- numbers ----------------------------------------------------------------------------------

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // dtypes

// Functions with `const int dtype` are inlined with a constant, so no branch on it remains.
#define INLINE static inline __attribute__((always_inline))

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

INLINE int bytes_of(const int dtype) {
    return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2;
}

// Appendix A has these:
INLINE float get(const void *array, int64_t i, const int dtype);         // number i of an array
INLINE Floats get_lanes(const void *array, int64_t i, const int dtype);  // LANES of them, from i on
INLINE Floats lanes_at(const float *array);                              // LANES floats
static void put(void *array, int64_t i, float x, int dtype);             // writes number i
static float dot(const float *x, const void *row, int n, int dtype);     // x [n] times a row
static float rounded(float x, int dtype);                                // x after put and get
INLINE float exponential(float x);                                       // e^x

// ---- TEAL: sums of the rows that matter -------------------------------------------------------

enum { AHEAD = 8 };  // a row is prefetched so many rows early, to have arrived by its turn
enum { PAD = AHEAD + 4 };  // entries beyond the end of a list that are looked at

// The entries of x [k] that matter: their indices and their values. Returns how many. The list of
// rows goes on for PAD entries, which may be prefetched but do not count.
static int keep_rows(const float *x, int k, float threshold, int32_t *rows, float *values) {
    int n = 0;
    for (int i = 0; i < k; i++) {  // no branch: the next one overwrites an entry that is not kept
        rows[n] = i;
        values[n] = x[i];
        n += !(fabsf(x[i]) <= threshold);  // "not", so that a NaN is kept and stays visible
    }
    for (int i = 0; i < PAD; i++) rows[n + i] = n ? rows[n - 1] : 0;
    return n;
}

// sums [width] += values[i] * row rows[i] of w, for each i below n: only these rows are read. A row
// has `stride` bytes. Four rows at a time, so that a sum is loaded and stored once for four
// products; past the end of the list, a row times 0.
INLINE void add_floats_of(float *restrict sums, const char *w, int64_t stride, const int32_t *rows,
                          const float *values, int n, int width, const int dtype) {
    const int size = bytes_of(dtype), line = 64 / size;  // 64 bytes are a line of the cache
    for (int i = 0; i < n; i += 4) {
        const char *row[4], *later[4];
        float x[4];
        for (int r = 0; r < 4; r++) {
            row[r] = w + rows[i + r < n ? i + r : i] * stride;
            later[r] = w + rows[i + r + AHEAD] * stride;
            x[r] = i + r < n ? values[i + r] : 0;
        }
        int j = 0;
        for (; j + line <= width; j += line) {
            for (int r = 0; r < 4; r++) __builtin_prefetch(later[r] + j * size, 0, 2);
            for (int l = j; l < j + line; l += LANES) {
                Floats sum = lanes_at(sums + l);
                for (int r = 0; r < 4; r++) sum += x[r] * get_lanes(row[r], l, dtype);
                memcpy(sums + l, &sum, sizeof sum);  // an unaligned store
            }
        }
        for (; j < width; j++)
            for (int r = 0; r < 4; r++) sums[j] += x[r] * get(row[r], j, dtype);
    }
}

// The same for a dtype that is known only when this runs.
static void add_floats(float *sums, const void *w, int64_t stride, const int32_t *rows,
                       const float *values, int n, int width, int dtype) {
    switch (dtype) {
    case FLOAT32: add_floats_of(sums, w, stride, rows, values, n, width, FLOAT32); break;
    case BFLOAT16: add_floats_of(sums, w, stride, rows, values, n, width, BFLOAT16); break;
    case FLOAT16: add_floats_of(sums, w, stride, rows, values, n, width, FLOAT16); break;
    case INT8: add_floats_of(sums, w, stride, rows, values, n, width, INT8); break;
    }
}

// ---- what Python fills in: look here when a name comes up -------------------------------------

typedef struct Packed Packed;  // appendix B
typedef struct Bounds Bounds;  // appendix C
typedef struct Threads Threads;  // appendix D
typedef struct Team Team;

// A matrix W [N, K]: up to three projections (as q, k, v) side by side, each with its threshold.
typedef struct {
    const Packed *packed;     // weights of few bits, one per projection, in place of w; or NULL
    const void *w;            // [K, N], W transposed; of the LM head W itself, [N, K]
    const uint32_t *groups;   // scales of int4 (appendix B)
    const float *scale;       // [N], multiplies the sums (int8), or NULL
    const float *bias;        // [N], added next, or NULL
    const float *thresholds;  // one per projection; a negative one keeps everything
    int64_t *kept;            // one per projection: how many rows were read so far
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

enum { NORM_NONE, NORM_HEAD, NORM_ALL };  // RMSNorm of q and k: none, each head, all heads at once

typedef struct {
    int32_t n_layers, hidden, inter, heads, kv_heads, head_dim, vocab, context;
    int32_t cache_dtype;
    int32_t qk_norm, norms_after;  // norms_after: RMSNorm of what a block adds, not of its input
    float growth, growth_at;  // q is multiplied by 1 + growth * ln(1 + position / growth_at)
    float eps;                // of RMSNorm
    const Layer *layers;
    int32_t n_ropes;          // kinds of RoPE: a layer has one of them
    const float *frequency, *factor;  // [n_ropes, head_dim / 2]: RoPE rotates pair j of a head by
                              // position * frequency[j] and multiplies it by factor[j]
    const float *norm;        // [hidden], of the last RMSNorm
    Matrix embedding, head;   // the first is [vocab, hidden], or packed
    const Bounds *bounds;     // of the head's logits, or NULL to read the whole head
    const int32_t *positions; // [context + PAD], 0, 1, ...: the list of rows that attention adds up
    int32_t n_shares;         // how many shares a stage is cut into
    int32_t list_size;        // the largest K of a block's matrices, and PAD
    // Shared: each worker writes its part, and the others read it after a barrier.
    float *sums[2];           // [row_shares, N]: [0] of qkv or gate_up, [1] of o or down
    float *attended;          // [heads * head_dim], what attention found
    float *mlp;               // [inter], silu(gate) * up
    float *logits;            // [vocab]
    // Private: one slice per worker, of whom there are at most n_shares.
    float *x, *h, *y;         // [hidden]: the residual stream, its norm, what is added to it
    float *qkv;               // [N of qkv]
    float *turns;             // [2, n_ropes, head_dim / 2], cosines and sines
    float *scores;            // [context]
    float *up;                // [inter]
    float *kept_x;            // [list_size], the kept x[k]
    int32_t *kept_k;          // [list_size], their k
    Team *team;               // the workers
    int32_t token, position;
} Model;

// ---- a product in shares ----------------------------------------------------------------------
//
// Every stage of a token (a product, attention, ...) is cut into n_shares shares, always as many.
// The workers divide them among themselves: with fewer workers, each takes more shares. No sum
// depends on who computes it, so the logits do not depend on how many workers take part.

enum { TILE = 3840 };  // columns summed at a time, whole blocks of every type: the sums fit into L1

// The shares of a product form a grid. Its row shares split the list of kept rows, so that a worker
// reads long stretches of memory. Each has its own sums, and `finish` adds them up: four at most,
// because every worker that reads the product repeats that. Its column shares split the columns.
static int row_shares(const Model *m) {
    int rows = m->n_shares < 4 ? m->n_shares : 4;
    while (m->n_shares % rows) rows--;
    return rows;
}

// Where share c begins if n columns are cut into `of` shares: at a multiple of 64 columns or of a
// packed block, so that two shares never write to the same line of the cache.
static int first_column(int n, int c, int of, int multiple) {
    return c == of ? n : (int64_t)n * c / of / multiple * multiple;
}

// Appendix B: weights of few bits. packed_block is how many columns their layout keeps together.
static int packed_block(const Matrix *a, int part);
static void add_packed(float *y, const Matrix *a, int part, int first, int width,
                       const int32_t *rows, const float *x, int n);
static void add_int4(float *y, const Matrix *a, int first, int width, const int32_t *rows,
                     const float *x, int n);

// y += x[i] * row rows[i] of a, for each i below n, but only some columns of one projection:
// `width` of them from its column `first` on, which begins a share or a TILE. y has room for TILE.
static void add_rows(float *y, const Matrix *a, int part, int first, int width, const int32_t *rows,
                     const float *x, int n) {
    int at = first + (part ? a->ends[part - 1] : 0), size = bytes_of(a->dtype);
    if (a->packed)
        add_packed(y, a, part, first, width, rows, x, n);
    else if (a->dtype == INT4)
        add_int4(y, a, at, width, rows, x, n);
    else
        add_floats(y, (const char *)a->w + (int64_t)at * size, (int64_t)a->n * size, rows, x, n,
                   width, a->dtype);
}

// A share of x [K] times a matrix, into the sums of its row share. Each share lists the kept rows
// anew: that spares a barrier.
static void product(const Model *m, const Matrix *a, const float *x, int worker, int share,
                    float *sums) {
    int n_row_shares = row_shares(m), n_column_shares = m->n_shares / n_row_shares;
    int r = share % n_row_shares, c = share / n_row_shares, n = 0;
    int32_t *rows = m->kept_k + (int64_t)worker * m->list_size;
    float *values = m->kept_x + (int64_t)worker * m->list_size, y[TILE];
    sums += (int64_t)r * a->n;
    for (int part = 0; part < a->n_parts; part++) {
        int start = part ? a->ends[part - 1] : 0;
        if (part == 0 || a->thresholds[part] != a->thresholds[part - 1])  // else, the same list
            n = keep_rows(x, a->k, a->thresholds[part], rows, values);
        int from = (int64_t)n * r / n_row_shares, to = (int64_t)n * (r + 1) / n_row_shares;
        if (share == 0) a->kept[part] += n;
        int columns = a->ends[part] - start, multiple = a->packed ? packed_block(a, part) : 64;
        int end = first_column(columns, c + 1, n_column_shares, multiple);
        for (int j = first_column(columns, c, n_column_shares, multiple); j < end; j += TILE) {
            int width = end - j < TILE ? end - j : TILE;
            memset(y, 0, sizeof y);  // all: a packed block may exceed width
            add_rows(y, a, part, j, width, rows + from, values + from, to - from);
            memcpy(sums + start + j, y, width * sizeof *y);
        }
    }
}

// Columns first ... first + n - 1 of a finished product, into y [n].
static void finish(const Model *m, const Matrix *a, const float *sums, int first, int n, float *y) {
    int n_row_shares = row_shares(m);
    memcpy(y, sums + first, n * sizeof *y);
    for (int r = 1; r < n_row_shares; r++)
        for (int j = 0; j < n; j++) y[j] += sums[(int64_t)r * a->n + first + j];
    if (a->scale)
        for (int j = 0; j < n; j++) y[j] *= a->scale[first + j];
    if (a->bias)
        for (int j = 0; j < n; j++) y[j] += a->bias[first + j];
}

// ---- the parts of a block ---------------------------------------------------------------------

static void embed_packed(const Model *m, float *x);  // appendix B

// The token's row of the embedding, into x [hidden].
static void embed(const Model *m, float *x) {
    const Matrix *a = &m->embedding;
    int64_t at = (int64_t)m->token * m->hidden;
    if (a->packed)
        embed_packed(m, x);
    else
        for (int i = 0; i < m->hidden; i++) x[i] = get(a->w, at + i, a->dtype);
}

// y = x [n], scaled to a root mean square of 1, times weight. y may be x.
static void rms_norm(float *y, const float *x, const float *weight, int n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n, FLOAT32) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// RoPE: the cosines and sines by which heads rotate at this position, for every kind of it.
static void turn(const Model *m, float *turns) {
    int n = m->n_ropes * m->head_dim / 2;
    for (int i = 0; i < n; i++) {
        turns[i] = cosf(m->position * m->frequency[i]) * m->factor[i];
        turns[n + i] = sinf(m->position * m->frequency[i]) * m->factor[i];
    }
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

// Adds up the q|k|v of the shares, rotates q and k, rounds k and v to the cache's dtype. Norms and
// growth are for some families.
static void prepare_heads(const Model *m, const Layer *layer, const float *turns, float *qkv) {
    int d = m->head_dim, heads = m->heads, kv_heads = m->kv_heads;
    const float *cosine = turns + layer->rope * d / 2, *sine = cosine + m->n_ropes * d / 2;
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
    for (int j = 0; j < 2 * kv_heads * d; j++) k[j] = rounded(k[j], m->cache_dtype);
}

// The share's part of the token's k and v, into the cache.
static void store_kv(const Model *m, const Layer *layer, const float *qkv, int share) {
    int d = m->head_dim, kv_heads = m->kv_heads, of = m->n_shares;
    const float *k = qkv + m->heads * d, *v = k + kv_heads * d;
    for (int kv = kv_heads * share / of; kv < kv_heads * (share + 1) / of; kv++)
        for (int j = 0; j < d; j++) {
            int64_t at = ((int64_t)kv * m->context + m->position) * d + j;
            put(layer->keys, at, k[kv * d + j], m->cache_dtype);
            put(layer->values, at, v[kv * d + j], m->cache_dtype);
        }
}

// y = softmax(q K^T / sqrt(head_dim)) V of one head, over n rows of its cache and the token's own k
// and v; p [n + 1] is for the probabilities.
static void attend(const Model *m, const float *q, const float *k, const float *v, const char *keys,
                   const char *values, int n, float *p, float *y) {
    int d = m->head_dim, dtype = m->cache_dtype;
    int64_t stride = (int64_t)d * bytes_of(dtype);
    float scale = 1 / sqrtf(d), most = -INFINITY, total = 0;
    for (int s = 0; s < n; s++) p[s] = dot(q, keys + s * stride, d, dtype) * scale;
    p[n] = dot(q, k, d, FLOAT32) * scale;
    for (int s = 0; s <= n; s++) most = p[s] > most ? p[s] : most;
    for (int s = 0; s <= n; s++) p[s] = exponential(p[s] - most);
    for (int s = 0; s <= n; s++) total += p[s];
    memset(y, 0, d * sizeof *y);
    add_floats(y, values, stride, m->positions, p, n, d, dtype);  // of rows 0 ... n - 1
    for (int j = 0; j < d; j++) y[j] = (y[j] + p[n] * v[j]) / total;
}

// Attention of the share's heads. Several heads of q may share one of k and v. The token's own k
// and v are those of qkv, for another worker may still be writing them into the cache.
static void attention(const Model *m, const Layer *layer, const float *qkv, float *scores,
                      int share) {
    int d = m->head_dim, heads = m->heads, of = m->n_shares, n = m->position;
    int first = layer->window && layer->window <= n ? n + 1 - layer->window : 0;
    for (int head = heads * share / of; head < heads * (share + 1) / of; head++) {
        int kv = head / (heads / m->kv_heads);
        const float *k = qkv + (heads + kv) * d, *v = k + m->kv_heads * d;
        int64_t at = ((int64_t)kv * m->context + first) * d * bytes_of(m->cache_dtype);
        attend(m, qkv + head * d, k, v, (const char *)layer->keys + at,
               (const char *)layer->values + at, n - first, scores, m->attended + head * d);
    }
}

// The share's part of gate_up, into m->mlp: silu(gate) decides how much of up goes on to down.
static void swiglu(const Model *m, const Matrix *gate_up, float *y, int share) {
    int first = first_column(m->inter, share, m->n_shares, 64);
    int n = first_column(m->inter, share + 1, m->n_shares, 64) - first;
    float *restrict gate = m->mlp + first, *restrict up = y;
    finish(m, gate_up, m->sums[0], first, n, gate);
    finish(m, gate_up, m->sums[0], m->inter + first, n, up);
    for (int j = 0; j < n; j++) gate[j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
}

// Adds a finished product to the residual stream x, after a norm where the model has it there.
static void add_to_stream(const Model *m, const Matrix *a, const float *norm, float *x, float *y) {
    finish(m, a, m->sums[1], 0, m->hidden, y);
    if (m->norms_after) rms_norm(y, y, norm, m->hidden, m->eps);
    for (int i = 0; i < m->hidden; i++) x[i] += y[i];
}

// Logit i: the product of the last hidden state h with row i of the LM head.
static float logit(const Model *m, const float *h, int i) {
    const Matrix *a = &m->head;
    const char *row = (const char *)a->w + (int64_t)i * a->k * bytes_of(a->dtype);
    return dot(h, row, a->k, a->dtype) * (a->scale ? a->scale[i] : 1);
}

enum { HEAD_AHEAD = 8192 };  // bytes that are prefetched; beyond the head's end is harmless

// The share's logits.
static void logits(const Model *m, const float *h, int share) {
    int first = first_column(m->vocab, share, m->n_shares, 64);
    int end = first_column(m->vocab, share + 1, m->n_shares, 64);
    int64_t row_bytes = (int64_t)m->head.k * bytes_of(m->head.dtype);
    for (int i = first; i < end; i++) {
        const char *later = (const char *)m->head.w + i * row_bytes + HEAD_AHEAD;
        for (int64_t j = 0; j < row_bytes; j += 64) __builtin_prefetch(later + j, 0, 2);
        m->logits[i] = logit(m, h, i);
    }
}

// ---- the workers ------------------------------------------------------------------------------

struct Team {
    int32_t active;      // how many workers take part in this token
    Threads *threads;    // appendix D
    char line0[64];      // each counter below has a line of the cache to itself
    int32_t arrived;     // how many have come to the barrier
    char line1[64];
    int32_t generation;  // how many barriers were opened
    char line2[64];
};

static void wait_for_others(Team *team, int32_t now);  // appendix D: until generation is not `now`

// Waits until all active workers have come here. The last to arrive resets `arrived` and opens the
// barrier by raising `generation`, which the others watch. RELEASE and ACQUIRE: what a worker wrote
// before the barrier, every worker sees after it.
static void barrier(Team *team) {
    // read before arriving: after a token's last barrier, `adapt` (appendix D) may change it
    int32_t active = team->active;
    if (active == 1) return;
    int32_t now = __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == active) {
        __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->generation, now + 1, __ATOMIC_RELEASE);
    } else {
        wait_for_others(team, now);
    }
}

// ---- one token --------------------------------------------------------------------------------

static void packed_logits(const Model *m, const float *h, int worker);            // appendix B
static void likely_logits(const Model *m, const float *h, int worker, float *y);  // appendix C

// A loop over the worker's shares of a stage.
#define FOR_SHARES for (int share = worker; share < m->n_shares; share += m->team->active)

// One worker's part of a token; all workers run this. FOR_SHARES divides a stage; the small rest
// (norms, RoPE, the residual stream) every worker computes for itself, which spares barriers. A
// barrier stands where one needs what the others computed. sums[0] and sums[1] alternate, so that a
// worker may begin the next product while another still reads the sums of the last.
static void decode(const Model *m, int worker) {
    Team *team = m->team;
    int64_t hidden = m->hidden, id = worker;  // 64 bits, so that offsets do not overflow
    float *x = m->x + id * hidden, *h = m->h + id * hidden, *y = m->y + id * hidden;
    float *qkv = m->qkv + id * m->layers[0].qkv.n;
    float *turns = m->turns + id * m->n_ropes * m->head_dim;
    float *scores = m->scores + id * m->context, *up = m->up + id * m->inter;

    embed(m, x);
    turn(m, turns);
    for (const Layer *layer = m->layers; layer < m->layers + m->n_layers; layer++) {
        // Attention reads the stream through a norm ...
        const float *in = m->norms_after ? x : h;
        if (!m->norms_after) rms_norm(h, x, layer->attn_norm, hidden, m->eps);
        FOR_SHARES product(m, &layer->qkv, in, worker, share, m->sums[0]);
        barrier(team);
        prepare_heads(m, layer, turns, qkv);
        FOR_SHARES store_kv(m, layer, qkv, share);
        FOR_SHARES attention(m, layer, qkv, scores, share);
        barrier(team);
        FOR_SHARES product(m, &layer->o, m->attended, worker, share, m->sums[1]);
        barrier(team);
        add_to_stream(m, &layer->o, layer->attn_norm, x, y);  // ... and adds to it.
        // So does the MLP.
        if (!m->norms_after) rms_norm(h, x, layer->mlp_norm, hidden, m->eps);
        FOR_SHARES product(m, &layer->gate_up, in, worker, share, m->sums[0]);
        barrier(team);
        FOR_SHARES swiglu(m, &layer->gate_up, up, share);
        barrier(team);
        FOR_SHARES product(m, &layer->down, m->mlp, worker, share, m->sums[1]);
        barrier(team);
        add_to_stream(m, &layer->down, layer->mlp_norm, x, y);
    }
    rms_norm(h, x, m->norm, hidden, m->eps);
    if (m->head.packed)
        packed_logits(m, h, worker);
    else if (m->bounds)
        likely_logits(m, h, worker, y);
    else
        FOR_SHARES logits(m, h, share);
    barrier(team);
}

// ---- The course ends here. What follows can be read when needed: ------------------------------
//
//   A. Numbers of every dtype, dot products, e^x
//   B. Weights of few bits: the int4 of quantize.py, and the types of GGUF files
//   C. Bounds of the LM head (read lm_head.py first)
//   D. The team: sleep between tokens, busy machines, start and end

// ---- A. numbers of every dtype, dot products, e^x ---------------------------------------------

INLINE Floats from_float16(Words half);
static uint16_t to_float16(uint32_t bits);

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

INLINE Floats lanes_at(const float *array) {
    Floats x;
    memcpy(&x, array, sizeof x);
    return x;
}

// Numbers i ... i + LANES - 1 of an array. Compilers make one or two instructions of each loop.
INLINE Floats get_lanes(const void *array, int64_t i, const int dtype) {
    Words words;
    Ints ints;
    switch (dtype) {
    case FLOAT32: return lanes_at((const float *)array + i);
    case INT8:
        for (int l = 0; l < LANES; l++) ints[l] = ((const int8_t *)array)[i + l];
        return __builtin_convertvector(ints, Floats);
    default:
        for (int l = 0; l < LANES; l++) words[l] = ((const uint16_t *)array)[i + l];
        // bfloat16 is the upper half of a float32
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

// Writes number i. Rounds to nearest, ties to even, as PyTorch does.
static void put(void *array, int64_t i, float x, int dtype) {
    uint32_t bits = bits_of(x);
    if (dtype == FLOAT32)
        ((float *)array)[i] = x;
    else if (dtype == FLOAT16)
        ((uint16_t *)array)[i] = to_float16(bits);
    else if (x != x)
        ((uint16_t *)array)[i] = bits >> 16 | 64;  // NaN stays NaN
    else
        ((uint16_t *)array)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
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

// The bits of a float32 -> those of the nearest float16.
static uint16_t to_float16(uint32_t bits) {
    uint32_t low = bits & 0x7fffffff, half;  // without the sign
    if (low > 0x7f800000)
        half = 0x7e00;  // NaN
    else if (low >= 0x477ff000)
        half = 0x7c00;  // from 65520 on: infinite
    else if (low < 0x38800000)
        half = lrintf(from_bits(low) * 0x1p24f);  // below 2^-14: a denormal, in steps of 2^-24
    else
        half = (low - (112u << 23) + 0xfff + (low >> 13 & 1)) >> 13;
    return half | (bits >> 16 & 0x8000);
}

static float rounded(float x, int dtype) {
    float number = 0;
    put(&number, 0, x, dtype);
    return get(&number, 0, dtype);
}

// The product of x [n] and one row. Four sums side by side, because each addition waits for the one
// before it.
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

// e^x = 2^n e^r with |r| <= ln 2 / 2: relative error 2e-7. Compilers vectorise it, but not expf.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    // Adding 1.5 * 2^23 rounds: the lowest bits of n are round(x / ln 2) ...
    float n = x * 1.44269504f + 12582912.0f;
    uint32_t power = bits_of(n) << 23;  // ... moved to the exponent's place
    n -= 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f
              + r / 720)))));
    return x == x ? from_bits(bits_of(p) + power) : x;
}

// ---- B. weights of few bits -------------------------------------------------------------------

#define UNROLL _Pragma("GCC unroll 16")

// First the int4 of quantize.py, as floats. 32 columns of a row share a scale s and a minimum m,
// w = s q + m; a->groups [K, N / 32] holds s in its lower half and m in its upper, both bfloat16.
// Byte j of a group's 16 holds column j in its low half and column j + 16 in its high.
static void add_int4(float *restrict sums, const Matrix *a, int first, int width,
                     const int32_t *rows, const float *values, int n) {
    const int half = 16 / LANES;
    for (int i = 0; i < n; i += 4) {
        const uint8_t *q[4], *later_q[4];
        const uint32_t *group[4], *later_group[4];
        float x[4];
        for (int r = 0; r < 4; r++) {
            int64_t at = ((int64_t)rows[i + r] * a->n + first) / 32;
            int64_t later = ((int64_t)rows[i + r + AHEAD] * a->n + first) / 32;
            q[r] = (const uint8_t *)a->w + 16 * at;
            later_q[r] = (const uint8_t *)a->w + 16 * later;
            group[r] = a->groups + at;
            later_group[r] = a->groups + later;
            x[r] = i + r < n ? values[i + r] : 0;
        }
        for (int64_t g = 0; g < width / 32; g++) {
            Floats sum[2 * half];
            float minimum = 0;
            UNROLL for (int l = 0; l < 2 * half; l++) sum[l] = lanes_at(sums + 32 * g + l * LANES);
            for (int r = 0; g % 4 == 0 && r < 4; r++) {  // lines of 64 bytes
                __builtin_prefetch(later_q[r] + 16 * g, 0, 2);
                if (g % 16 == 0) __builtin_prefetch(later_group[r] + g, 0, 2);
            }
            UNROLL for (int r = 0; r < 4; r++) {
                float scale = x[r] * from_bits(group[r][g] << 16);
                minimum += x[r] * from_bits(group[r][g] & 0xffff0000);
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

// The rest of this appendix is about the types of GGUF files: TEAL in integers. A weight is
// s (q - offset) + m, with an integer q of few bits. A *group* of 16 or 32 inputs shares one row of
// scales s and one of minimums m. In each group, the kept x are rounded to multiples of one step,
// so that sums of x q are sums of integers, modulo 2^16.
//
// A word of 16 bits holds several q, its *fields*. With 4 bits, w = a + 16 b + 256 c + 4096 d. Let
// t[i] be the sum of x * (w >> 4 i) over the kept rows. Then t[0] - 16 t[1] is the sum of x a,
// t[1] - 16 t[2] that of x b, and so on. A vector has 16 words, so a shift, a product and an
// addition serve 16 weights. A *block* is the columns that one or three vectors of words hold:
//
//   4 bits   64 columns in 16 words, four fields each
//   5 bits   48 columns in 16 words, three fields each
//   6 bits  128 columns in three times 16 words a, b, c: two fields of 6 bits each; of field 6, the
//           lower four bits are the top of a and the upper two stand in c (bits 12 and 13); of
//           field 7, the top of b and bits 14 and 15 of c
//   8 bits   32 columns in 16 words, two columns each, summed as four fields of 4 bits
//
// 16 bits must hold a group's sums: (sum of |x| / step) * most < 2^16, with `most` the largest
// field. Rounding may add 1/2 to each of the m kept |x| / step: step = sum |x| / (65535 / most -
// m / 2). So y[n] is off by at most the sum over groups of step / 2 * sum |w[k, n]|, over the kept
// k. With 4 bits and 32 random x, step / sqrt(12), the usual error of an x, is 1/600 of the x.

struct Packed {
    const uint16_t *words;            // [K, n_words], the q
    const uint16_t *scale, *minimum;  // [K / group, columns], float16, in multiples of `unit`;
                                      // minimum may be NULL
    int32_t bits, group, offset, n_words, columns;
    float unit;
};

typedef uint16_t Shorts __attribute__((vector_size(32)));  // 16 words

INLINE int block_columns(const int bits) {
    return bits == 4 ? 64 : bits == 5 ? 48 : bits == 6 ? 128 : 32;
}

INLINE int block_words(const int bits) { return bits == 6 ? 48 : 16; }

// How many sums t a block needs.
INLINE int block_sums(const int bits) { return bits == 5 ? 3 : bits == 6 ? 10 : 4; }

static int packed_block(const Matrix *a, int part) {
    return block_columns(a->packed[part].bits);
}

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

// sums [blocks, block_sums] += x[i] * (shifted words of row rows[i]), for each of the first m of n
// entries, four at a time: x is 0 up to the next multiple of four.
INLINE void add_words(Shorts *restrict sums, const uint16_t *words, int64_t stride,
                      const int32_t *rows, const int16_t *x, int m, int n_blocks,
                      const int bits) {
    const int n_words = block_words(bits), n_sums = block_sums(bits);
    for (int i = 0; i < m; i += 4) {
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
// number, and `unit` in add_blocks_of makes up for it. The mask clears copies of the sign bit. Not
// for denormals, infinities or NaN.
INLINE Floats small_halves(const uint16_t *array) {
    Ints halves;
    for (int l = 0; l < LANES; l++) halves[l] = array[l];
    return (Floats)((Words)((halves << 16) >> 3) & 0x8fffe000);
}

// Sums of a block's columns j ... j + LANES - 1, from those of its fields.
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

// y += s * (sum * step - base) + m * x, for all columns of one group; here x is the sum of its kept
// x, and its s and m begin at index `at`. A field's sum is known modulo 2^16 only, and negative x
// can make it negative: `lift`, the most that they subtract, makes it positive. `base` takes lift
// and offset away again. (8 bits: low + 16 * high, both lifted, so 17 lifts.)
INLINE void add_group(float *restrict y, const Shorts *sums, const Packed *w, int64_t at,
                      int n_blocks, float step, float base, float x, uint16_t lift,
                      const int bits) {
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
INLINE void add_blocks_of(float *restrict y, const Packed *w, int first, int n_blocks,
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

static void add_blocks(float *y, const Packed *w, int first, int n_blocks, const int32_t *rows,
                       const float *x, int n) {
    switch (w->bits) {
    case 4: add_blocks_of(y, w, first, n_blocks, rows, x, n, 4); break;
    case 5: add_blocks_of(y, w, first, n_blocks, rows, x, n, 5); break;
    case 6: add_blocks_of(y, w, first, n_blocks, rows, x, n, 6); break;
    case 8: add_blocks_of(y, w, first, n_blocks, rows, x, n, 8); break;
    }
}

static void add_packed(float *y, const Matrix *a, int part, int first, int width,
                       const int32_t *rows, const float *x, int n) {
    int block = packed_block(a, part);
    add_blocks(y, &a->packed[part], first / block, (width + block - 1) / block, rows, x, n);
}

// A packed embedding is W transposed, too: a token's row is a column of it, found one k at a time.
static void embed_packed(const Model *m, float *x) {
    int width = packed_block(&m->embedding, 0);
    const float one = 1;
    for (int32_t k = 0; k < m->hidden; k++) {
        float block[128] = {0};
        add_blocks(block, m->embedding.packed, m->token / width, 1, &k, &one, 1);
        x[k] = block[m->token % width];
    }
}

// A packed LM head is multiplied as a block's matrices are.
static void packed_logits(const Model *m, const float *h, int worker) {
    FOR_SHARES product(m, &m->head, h, worker, share, m->sums[0]);
    barrier(m->team);
    FOR_SHARES {
        int first = first_column(m->vocab, share, m->n_shares, 64);
        int n = first_column(m->vocab, share + 1, m->n_shares, 64) - first;
        finish(m, &m->head, m->sums[0], first, n, m->logits + first);
    }
}

// Columns of a projection that become floats, and the rows of them that a thread takes.
typedef struct {
    const Matrix *a;
    float *y;
    int part, first, width, stride, from, to;
} Piece;

static void *unpack_rows(void *argument) {
    const Piece *p = argument;
    const float one = 1;
    for (int32_t k = p->from; k < p->to; k++) {
        float *y = p->y + (int64_t)k * p->stride;
        int32_t rows[1 + PAD];
        for (int i = 0; i < 1 + PAD; i++) rows[i] = k;
        memset(y, 0, p->stride * sizeof *y);
        for (int j = 0; j < p->width; j += TILE)
            add_rows(y + j, p->a, p->part, p->first + j,
                     p->width - j < TILE ? p->width - j : TILE, rows, &one, 1);
    }
    return NULL;
}

// For prefill (cpu/matrix.py): columns first ... first + width - 1 of a projection as floats, into
// y [K, stride], which has room for whole blocks.
void unpack(const Matrix *a, int32_t part, int32_t first, int32_t width, int32_t stride, float *y,
            int32_t n_threads) {
    Piece pieces[64];
    pthread_t threads[64];
    for (int t = 0; t < n_threads; t++) {
        int from = (int64_t)a->k * t / n_threads, to = (int64_t)a->k * (t + 1) / n_threads;
        pieces[t] = (Piece){a, y, part, first, width, stride, from, to};
        if (t == n_threads - 1 || pthread_create(&threads[t], NULL, unpack_rows, &pieces[t])) {
            pieces[t].to = a->k;  // the last rows are the caller's
            n_threads = t;
        }
    }
    unpack_rows(&pieces[n_threads]);
    for (int t = 0; t < n_threads; t++) pthread_join(threads[t], NULL);
}

// ---- C. bounds of the LM head -----------------------------------------------------------------
//
// Read lm_head.py first: it says why few rows of the LM head can hold the largest logits, and
// proves it. `round_state` and `bound` are its `bounds`, with the same constants.

enum { GROUP = 64 };  // rows of the LM head that share a lower bound

struct Bounds {
    const int8_t *q;          // [vocab, hidden], the rows rounded
    const float *scale, *error, *norm;  // [vocab] each: s, |w - s q|, |w|
    const uint8_t *seen;      // [vocab], whose logits the penalty changes, or NULL
    float penalty;
    int32_t top;              // how many of the largest logits matter
    float fill;               // the logit of a row that is not read
    float limit;              // a bound beyond +-limit proves nothing
    float largest_v;          // the largest |v[i]|
    // Shared: each worker writes its part, and the others read it after a barrier.
    float *upper;             // [vocab]
    float *lower;             // [groups], the largest lower bound of each group of rows
    int64_t *read;            // [n_shares], the rows of the head that each share read
    // Private: one slice per worker.
    int16_t *v;               // [n_shares, hidden], the hidden state in integers
};

// The hidden state h is about t * v, with integers v. In units of t, norm is |h|, and rest is
// |h - t v| with a margin for rounding.
typedef struct { const int16_t *v; float t, norm, rest; } Rounded;

static Rounded round_state(const Model *m, const float *h, int worker, float *exact) {
    int k = m->hidden;
    int16_t *v = m->bounds->v + (int64_t)worker * k;
    float most = 0;
    for (int i = 0; i < k; i++) most = fabsf(h[i]) > most ? fabsf(h[i]) : most;
    float t = most / m->bounds->largest_v;
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

// The share's upper bounds, and the lower bounds of its groups. Shares begin at multiples of GROUP,
// so no group lies in two of them.
static void bound(const Model *m, Rounded h, int share) {
    const Bounds *b = m->bounds;
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
        // A row that proves nothing (also NaN) makes least_upper ask for all rows.
        if (!(lower > -b->limit && upper < b->limit)) lower = INFINITY;
        float *group = b->lower + i / GROUP;
        *group = i % GROUP && *group > lower ? *group : lower;
        b->upper[i] = upper;
    }
}

// What an upper bound must reach: the top-th largest of the groups' lower bounds, so that at least
// `top` logits reach it; -INFINITY if all rows must be read. One bound per group can only lower it.
static float least_upper(const Model *m) {
    const Bounds *b = m->bounds;
    int groups = (m->vocab + GROUP - 1) / GROUP;
    float largest = -INFINITY;
    for (int g = 0; g < groups; g++) largest = b->lower[g] > largest ? b->lower[g] : largest;
    if (largest == INFINITY || b->top > groups) return -INFINITY;
    if (b->top == 1) return largest;
    // Floats sort like their bits as int32 if the lower 31 bits of negative ones are inverted. The
    // answer is built from its highest bit down: a bit stays if `top` bounds still reach it.
    int32_t reached = INT32_MIN;
    for (int bit = 31; bit >= 0; bit--) {
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

// The logits that can be among the `top` largest; the others become `fill`.
static void likely_logits(const Model *m, const float *h, int worker, float *y) {
    const Bounds *b = m->bounds;
    Rounded rounded = round_state(m, h, worker, y);
    FOR_SHARES bound(m, rounded, share);
    barrier(m->team);
    float least = least_upper(m);
    FOR_SHARES {
        int first = first_column(m->vocab, share, m->n_shares, GROUP);
        int end = first_column(m->vocab, share + 1, m->n_shares, GROUP);
        b->read[share] = 0;
        for (int i = first; i < end; i++) {
            int likely = !(b->upper[i] < least);
            m->logits[i] = likely ? logit(m, h, i) : b->fill;
            b->read[share] += likely;
        }
    }
}

// ---- D. the team ------------------------------------------------------------------------------
//
// Workers sleep between tokens. A team also notices when other programs take its processors: then
// workers wait long for one that does not run, and fewer workers are faster. So the team halves,
// and tries again later.

enum {
    SPINS = 200,        // times a worker checks a barrier before it lets others run
    IDLE_NS = 1000000,  // how long a worker waits awake for the next token
    CROWDED = 4,        // crowded tokens in a row before a team halves
    REST = 8,           // tokens for which it stays halved at first
    MOST_REST = 1024,
    MOST_WORKERS = 64,
};

typedef struct {
    Model *m;
    int number;
    pthread_t thread;
} Worker;

struct Threads {
    int32_t size;               // all workers; the first is the thread that calls `step`
    Worker workers[MOST_WORKERS];
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int64_t job;                // the token's number * 256 + active (64 at most); -1 to end
    int64_t waited;             // at the barriers of a token, all workers together; nanoseconds
    int64_t tokens, until;      // tokens so far; at which number all workers are tried again
    int32_t crowded, rest;      // tokens in a row with long waits; how long a team stays halved
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

// Waits until the generation of a barrier is no longer `now`.
static void wait_for_others(Team *team, int32_t now) {
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) != now) return;
        pause_a_moment();
    }
    int64_t start = nanoseconds();
    while (__atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == now) sched_yield();
    __atomic_add_fetch(&team->threads->waited, nanoseconds() - start, __ATOMIC_RELAXED);
}

// After a token: halves the team if its workers waited an eighth of the time, on average, in
// CROWDED tokens in a row. After `rest` tokens, all take part again; if that soon makes them wait,
// the next rest is twice as long.
static void adapt(Team *team, int64_t elapsed) {
    Threads *t = team->threads;
    int64_t waited = __atomic_exchange_n(&t->waited, 0, __ATOMIC_RELAXED);
    t->crowded = waited * 8 > elapsed * team->active ? t->crowded + 1 : 0;
    if (t->crowded == CROWDED) {
        int again = t->tokens < t->until + REST;  // soon after all were tried
        t->rest = !again ? REST : 2 * t->rest < MOST_REST ? 2 * t->rest : MOST_REST;
        t->until = t->tokens + t->rest;
        t->crowded = 0;
        team->active = (team->active + 1) / 2;
    } else if (team->active < t->size && t->tokens >= t->until) {
        t->crowded = CROWDED - 1;  // one crowded token ends this try
        team->active = t->size;
    }
    t->tokens++;
}

// The next job, when it is no longer `last`: awake for a moment if this worker took part in the
// last token, else asleep.
static int64_t next_job(Threads *t, int64_t last, int awake) {
    int64_t job, start = nanoseconds();
    do {
        job = __atomic_load_n(&t->job, __ATOMIC_ACQUIRE);
        if (job != last) return job;
        sched_yield();
    } while (awake && nanoseconds() - start < IDLE_NS);
    pthread_mutex_lock(&t->mutex);
    while ((job = __atomic_load_n(&t->job, __ATOMIC_ACQUIRE)) == last)
        pthread_cond_wait(&t->wake, &t->mutex);
    pthread_mutex_unlock(&t->mutex);
    return job;
}

static void give_job(Threads *t, int64_t job) {
    pthread_mutex_lock(&t->mutex);
    __atomic_store_n(&t->job, job, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->mutex);
}

static void *work(void *argument) {
    const Worker *self = argument;
    flush_denormals();
    int active = 0;
    for (int64_t job = 0; (job = next_job(self->m->team->threads, job, active)) >= 0;) {
        active = self->number < (job & 255);
        if (active) decode(self->m, self->number);
    }
    return NULL;
}

// Starts all workers but the first. n_shares is MOST_WORKERS at most.
void start_team(Model *m) {
    Team *team = m->team = calloc(1, sizeof *team);
    Threads *t = team->threads = calloc(1, sizeof *t);
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->wake, NULL);
    for (t->size = 1; t->size < m->n_shares; t->size++) {
        Worker *worker = &t->workers[t->size];
        worker->m = m;
        worker->number = t->size;
        if (pthread_create(&worker->thread, NULL, work, worker))
            break;  // the workers that exist take all shares
    }
    team->active = t->size;
    t->rest = REST;
}

// Ends the workers of start_team.
void stop_team(Model *m) {
    Threads *t = m->team->threads;
    give_job(t, -1);
    for (int i = 1; i < t->size; i++) pthread_join(t->workers[i].thread, NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->mutex);
    free(t);
    free(m->team);
}

// Reads `token`, which stands at `position`, with what the cache holds: fills m->logits.
void step(Model *m, int32_t token, int32_t position) {
    Threads *t = m->team->threads;
    fenv_t before;
    fegetenv(&before);
    flush_denormals();
    m->token = token;
    m->position = position;
    int64_t start = nanoseconds();
    // The number of workers is part of the job: one that wakes late must know if it takes part.
    give_job(t, ((t->job >> 8) + 1) << 8 | m->team->active);
    decode(m, 0);
    adapt(m->team, nanoseconds() - start);
    fesetenv(&before);
}
