/* The runtime of kru_run.h: the weight file, sampling, the interface. All that computes is in kru_run.inc, included once
 * for each vector width; the widest that the processor has is chosen when a stream is opened.
 *
 * A weight file, little-endian, each tensor padded to 4 bytes:
 *     header (struct header below), F pairs (P_f, Q_f), the texts of the tokens (a byte of length, then UTF-8)
 *     embedding: tokens, rows (V, E); or frames, a map of input_size -> E
 *     layers: [norm (D), map D -> K N]  factors (R, K, P_f, Q_f), f = 0 .. F-1, and bias (rows, N)
 *             [map O N -> D]  [norm (D), map D -> 2 I, map I -> D]
 *     With a rank r, maps D -> r -> K N and O N -> r -> D, dense, stand for the two of a block.
 *     [norm (D)], head: map -> outputs, and its bias          [ ]: residual blocks; with I > 0
 *     of a chain over the keys: map input_size -> outputs of the frame before, rows w (keys, H), rows v (keys, H); its
 *     windows: rows (2 W, C), rows (C, H), numbers (C), rows (1, C)
 *     64 zero bytes: vectors may read past the end of a row
 * numbers   fp32: floats; int8: fp16; int4: rows of them
 * rows      fp32: floats (rows, columns); else fp16 scales (rows), then int8 (rows, columns)
 * map       y = sum over i < n of (A_i x B_i) x, or dense (n = 1: no A): A as rows (n n, n); then
 *           fp32: B (n, in/n, out/n), inputs before outputs; else fp16 scales (out/n), of all terms alike, and codes
 *           (n, pairs, out/n, 2) of two inputs each: int8, or for 4 bits a byte, the first input's in the low half.
 *           With fewer outputs than inputs the terms come beside the outputs: (in/n, n, out/n), (pairs, n, out/n, 2).
 *           A single input: its weights as rows (1, out)
 * The factors of the complex cell are floats whatever the dtype: an error of its eigenvalues grows with every step.
 * Codes are multiplied by activations in 16 bits (a scale for each row of A x), and added up exactly: every processor
 * computes the same sums. */
#include "kru_run.h"

#include <string.h>

/* Vectors are those of GCC and Clang. Other compilers, and -DKRU_SCALAR for the smallest code, go one float at a time;
 * -DKRU_GENERIC leaves out what is of one kind of processor. */
#ifndef __GNUC__
#define KRU_SCALAR 1
#endif
#if !defined(KRU_SCALAR) && !defined(KRU_GENERIC)
#if defined(__x86_64__)
#include <immintrin.h>
#define KRU_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define KRU_NEON 1
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#define KRU_WASM 1
#endif
#endif

#define MAX_FACTORS 64
#define MAX_TERMS 256 /* of a map: n^3 numbers are far from overflow */
#define SLACK 16 /* floats after each buffer: the widest vector less one, and one */
#define LIMIT (1u << 26)
#define OCTAVE 12
#define WINDOW (2 * OCTAVE + 1) /* keys that each key sees, of the frame before around it, of its own below it */

enum { FP32, INT8, INT4 };
enum { KRU_CELL, LSTM, GRU, JANET, PEEPHOLE, CELLS };
enum { PLAIN = 1, READOUT_NORM = 2, IDENTITY = 4, HEAD_BIAS = 8 };

/* Inputs K, rows of the bias, tensors S of the state, planes O of the features. */
static const struct {
    int planes, rows, states, features;
} CELL[CELLS] = {{2, 1, 2, 2}, {4, 4, 2, 1}, {3, 4, 1, 1}, {2, 2, 1, 1}, {4, 7, 2, 1}};

typedef struct {
    uint32_t magic, bytes, crc; /* "KRU2", of the whole file, of all that follows this field */
    uint32_t dtype, head, vocabulary, input_size, outputs, embedding, hidden, state, cell, flags, layers, terms, factors;
    uint32_t map_terms, intermediate, rank; /* rank: 0, or r of low-rank maps */
    uint32_t channels;                      /* C of the windows of a chain */
    float epsilon;
    uint32_t text_bytes;
} header;

typedef struct { /* y = W x, W (out, in) a sum of n Kronecker products */
    int in, out, n;
    int after, reads, writes; /* A after B? rows (n, reads) of what B reads, (n, writes) of what it gives */
    int parts, pairs;         /* of a row that B reads: terms, pairs of inputs in all */
    float level;              /* the largest activation in 16 bits whose sums stay below 2^31 */
    const float *mixing;      /* A; NULL: dense */
    const float *weights;     /* B (reads, writes), in the file; or NULL and */
    const uint8_t *codes;     /* (pairs, writes, 2), in the file */
    const float *scales;      /* (writes) */
    const float *bias;    /* (out), or NULL */
} map;

typedef struct { /* of a layer; NULL where the model has none */
    const float *norm, *ff_norm, *bias; /* (D), (D), (rows, padded N) */
    const float **factors;              /* (R, F): see read_factor */
    float *state;                       /* (S, padded N) */
    map narrow, in, out, widen, gate_up, down;
} layer;

struct kru {
    header h;
    uint32_t shapes[MAX_FACTORS][2]; /* P_f, Q_f */
    const char *texts;
    int padded; /* N up to a multiple of 16 */
    map input, head;
    const float *table, *norm; /* (V, E) or NULL, (D) */
    map before;                /* of a chain: of the frame before */
    const float *lower, *keys; /* (keys, H) each: w and v */
    const float *near, *near_context, *near_bias, *near_out; /* windows: (2, W, C), (C, H), (C), (C) */
    layer *layers;
    float *x, *u, *wide, *features, *z, *term, *ping, *pong, *logits; /* of a step: see work */
    float *mixed, *row_scales, *hidden, *scores; /* (n, in), (n), (H), (keys + 1) */
    float *seen, *units; /* (keys, C) each: of the windows, after the frame before, and after the lower keys as well */
    int16_t *coded;                                                   /* (n, pairs, 2) */
    const float *(*run)(struct kru *k);
};

/* ---- reading --------------------------------------------------------------------------------------------------- */
typedef struct { /* a walk over the file: the first time without memory, to measure */
    const uint8_t *at, *end;
    char *memory;
    uint64_t used;
    const char *error;
} reader;

static const uint8_t *take(reader *r, uint64_t bytes) {
    const uint8_t *found = r->at;
    bytes = (bytes + 3) & ~(uint64_t)3;
    if (bytes > (uint64_t)(r->end - r->at)) {
        r->error = "the file ends before its last tensor";
        r->at = r->end;
        return NULL;
    }
    r->at += bytes;
    return found;
}

/* Memory for so many bytes, NULL when measuring; everything that vectors read has room to read past its end. */
static void *room(reader *r, uint64_t bytes) {
    uint64_t at = r->used;
    r->used += (bytes + 4 * SLACK + 63) & ~(uint64_t)63;
    return r->memory ? r->memory + at : NULL;
}

static float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, bits = h & 1023;
    union {
        uint32_t u;
        float f;
    } value;
    if (exponent == 0) { /* 0 and the smallest numbers: bits * 2^-24 */
        value.f = (float)bits * 5.9604644775390625e-8f;
        value.u |= sign;
    } else
        value.u = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | bits << 13;
    return value.f;
}

/* A matrix (rows, count), a row every `stride`: floats, fp16, or codes of 8 bits with a scale for each row. */
enum { FLOATS, HALVES, CODES };
static const float *matrix(reader *r, int form, uint64_t rows, uint64_t count, uint64_t stride) {
    float *to = room(r, 4 * rows * stride);
    const uint16_t *scales = form == CODES ? (const uint16_t *)take(r, 2 * rows) : NULL;
    const uint8_t *from = take(r, rows * count * (form == FLOATS ? 4 : form == HALVES ? 2 : 1));
    if (!to || r->error) return to;
    for (uint64_t i = 0; i < rows; i++)
        for (uint64_t j = 0, at = i * count; j < stride; j++, at++)
            to[i * stride + j] = j >= count       ? 0.0f
                                 : form == FLOATS ? ((const float *)from)[at]
                                 : form == HALVES ? from_half(((const uint16_t *)from)[at])
                                                  : from_half(scales[i]) * (float)((const int8_t *)from)[at];
    return to;
}
static const float *numbers(reader *r, int dtype, uint64_t rows, uint64_t count, uint64_t stride) {
    return matrix(r, dtype == FP32 ? FLOATS : dtype == INT8 ? HALVES : CODES, rows, count, stride);
}
static const float *rows(reader *r, int dtype, uint64_t count, uint64_t columns) {
    return matrix(r, dtype == FP32 ? FLOATS : CODES, count, columns, columns);
}

static map read_map(reader *r, kru *k, uint64_t in, uint64_t out, uint64_t n, int bias) {
    map m = {(int)in, (int)out, (int)n, 0, 0, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL};
    int dtype = (int)k->h.dtype;
    if (in % n || out % n || !in || !out) {
        r->error = "the terms of a map do not divide its widths";
        return m;
    }
    const uint64_t part = in / n, each = out / n;
    m.after = n > 1 && each < part;
    m.parts = (int)(m.after ? 1 : n), m.reads = (int)(part * (uint64_t)m.parts), m.writes = (int)(m.after ? out : each);
    m.pairs = m.parts * (int)((part + 1) / 2);
    if (n > 1) { /* in the file (t, a, b): term, row, column of A_t; here (a, t, b), or (a, b, t) */
        const float *from = rows(r, dtype, n * n, n);
        float *to = room(r, 4 * n * n * n);
        for (uint64_t i = 0; to && !r->error && i < n * n * n; i++) {
            const uint64_t t = i / n / n, a = i / n % n, b = i % n;
            to[a * n * n + (m.after ? b * n + t : t * n + b)] = from[i];
        }
        m.mixing = to;
    }
    if (dtype == FP32)
        m.weights = (const float *)take(r, 4 * in * each);
    else if (in == 1)
        m.weights = rows(r, dtype, 1, out);
    else {
        const float *scales = matrix(r, HALVES, 1, each, each);
        float *to = room(r, 4 * (uint64_t)m.writes);
        for (int i = 0; to && !r->error && i < m.writes; i++) to[i] = scales[(uint64_t)i % each];
        m.scales = to;
        m.codes = take(r, (uint64_t)m.pairs * (uint64_t)m.writes * (dtype == INT8 ? 2 : 1));
        m.level = 2147483647.0f / ((dtype == INT8 ? 128.0f : 8.0f) * 2.0f * (float)m.pairs);
        m.level = m.level > 32767.0f ? 32767.0f : (float)(int)m.level;
    }
    if (bias) m.bias = numbers(r, dtype, 1, out, out);
    return m;
}

/* A factor (K, P, Q) in the form that it is applied in. The last one multiplies from the right, all planes at once:
 * gated (Q, K P); complex (2, Q, 2 P), of the real and the imaginary part of h. Others multiply from the left: gated
 * (K, P, Q); complex (3, P, Q): real, imaginary and minus imaginary part. */
static const float *read_factor(reader *r, const kru *k, int f) {
    const uint64_t P = k->shapes[f][0], Q = k->shapes[f][1], K = (uint64_t)CELL[k->h.cell].planes;
    const int complex = k->h.cell == KRU_CELL, last = f == (int)k->h.factors - 1, fp32 = complex || k->h.dtype == FP32;
    float *to = room(r, 4 * (complex ? 4 : K) * P * Q);
    const uint16_t *scales = fp32 ? NULL : (const uint16_t *)take(r, 2 * K * P);
    const uint8_t *from = take(r, K * P * Q * (fp32 ? 4 : 1));
    if (!to || r->error) return to;
    for (uint64_t i = 0; i < K * P * Q; i++) {
        const uint64_t q = i % Q, p = i / Q % P, g = i / Q / P;
        float w = fp32 ? ((const float *)from)[i] : from_half(scales[i / Q]) * (float)((const int8_t *)from)[i];
        if (last)
            to[q * K * P + g * P + p] = w;
        else
            to[i] = w;
        if (complex && last) to[(Q + q) * 2 * P + (1 - g) * P + p] = g ? -w : w;
        if (complex && !last && g) to[i + P * Q] = -w;
    }
    return to;
}

static uint32_t crc32(const uint8_t *p, size_t n) {
    uint32_t crc = ~0u, table[256];
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int j = 0; j < 8; j++) table[i] = table[i] >> 1 ^ (0xedb88320u & (0u - (table[i] & 1)));
    }
    while (n--) crc = crc >> 8 ^ table[(crc ^ *p++) & 255];
    return ~crc;
}

static const char *check_header(const header *h, size_t bytes) {
    const uint32_t sizes[] = {h->outputs, h->embedding, h->hidden, h->state,     h->layers,
                              h->terms,   h->factors,   h->map_terms, h->vocabulary, h->input_size,
                              h->intermediate, h->text_bytes, h->channels, h->rank};
    const int positive = 8;
    if (h->magic != 0x3255524bu) return "not a weight file of this version: it does not begin with KRU2";
    if (h->bytes != bytes) return "the file is not as long as its header says";
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++)
        if (sizes[i] > LIMIT || (i < positive && !sizes[i])) return "a size in the header is out of range";
    if (h->dtype > INT4 || h->head > KRU_CHAIN || h->cell >= CELLS || h->flags > 15) return "the header names an unknown kind";
    if (h->factors > MAX_FACTORS) return "more than 64 factors";
    if (h->map_terms > MAX_TERMS) return "more than 256 terms of a map";
    if (!h->vocabulary == !h->input_size) return "the model reads neither tokens nor frames, or both";
    if (h->head == KRU_TEXT ? h->outputs != h->vocabulary
        : h->head == KRU_ROLL ? h->outputs != h->input_size
                              : h->head == KRU_CHAIN && (!h->input_size || !h->channels || h->outputs <= h->input_size))
        return "the outputs are not as many as the head has";
    if (!(h->epsilon >= 0.0f && h->epsilon < 1.0f)) return "the header's epsilon is out of range";
    return NULL;
}

/* Fills k, or with r->memory NULL only counts what that takes. */
static void read_model(reader *r, kru *k) {
    header *h = &k->h;
    const uint8_t *at = take(r, 8 * (uint64_t)h->factors);
    if (!at) return;
    memcpy(k->shapes, at, 8 * (size_t)h->factors);
    uint64_t N = h->state, ins = 1, outs = 1, widest = N, size = N, D = h->hidden, I = h->intermediate;
    for (uint32_t f = 0; f < h->factors; f++) {
        uint64_t P = k->shapes[f][0], Q = k->shapes[f][1];
        if (!P || !Q || P > N || Q > N || (outs *= P) > N || (ins *= Q) > N) {
            r->error = "the factors do not multiply to the state's size";
            return;
        }
    }
    if (ins != N || outs != N) {
        r->error = "the factors do not multiply to the state's size";
        return;
    }
    for (uint32_t f = h->factors; f-- > 0;) {
        size = size / k->shapes[f][1] * k->shapes[f][0];
        if (size > widest) widest = size;
    }
    if (widest > LIMIT) {
        r->error = "the factors make the state too wide on the way";
        return;
    }
    k->texts = (const char *)take(r, h->text_bytes);
    if (r->error) return;
    for (uint32_t t = 0, used = 0; h->text_bytes && t <= h->vocabulary; t++) {
        if (t == h->vocabulary ? used != h->text_bytes : used >= h->text_bytes) {
            r->error = "the texts of the tokens do not fit";
            return;
        }
        if (t < h->vocabulary) used += 1u + (uint8_t)k->texts[used];
    }
    uint64_t plain = h->flags & PLAIN, K = (uint64_t)CELL[h->cell].planes, O = (uint64_t)CELL[h->cell].features;
    uint64_t rank = h->rank ? h->rank : D; /* width that the maps of a block pass through */
    uint64_t n = h->map_terms, padded = (N + 15) & ~(uint64_t)15, E = h->embedding;
    if (plain ? E != K * N || h->layers != 1 || I || n != 1 || h->rank : E != D) {
        r->error = "the widths of embedding and layers do not fit";
        return;
    }
    k->padded = (int)padded;
    k->table = NULL;
    if (h->vocabulary)
        k->table = rows(r, (int)h->dtype, h->vocabulary, E);
    else
        k->input = read_map(r, k, h->input_size, E, 1, 0);
    /* a layer takes at least 4 bytes of the file: no number of layers outgrows memory */
    if (!r->error && (uint64_t)h->layers * h->terms * h->factors > (uint64_t)(r->end - r->at)) take(r, r->end - r->at + 1);
    if (r->error) return;
    layer *layers = room(r, h->layers * sizeof(layer)), spare;
    const float **factors = room(r, (uint64_t)h->layers * h->terms * h->factors * sizeof(float *));
    memset(&spare, 0, sizeof spare);
    k->layers = layers;
    for (uint32_t i = 0; i < h->layers && !r->error; i++) {
        layer *l = layers ? layers + i : &spare;
        *l = spare;
        if (!plain) {
            l->norm = numbers(r, (int)h->dtype, 1, D, D);
            if (h->rank) l->narrow = read_map(r, k, D, rank, 1, 0);
            l->in = read_map(r, k, rank, K * N, n, 0);
        }
        if (factors) l->factors = factors + (size_t)i * h->terms * h->factors;
        for (uint32_t t = 0; t < h->terms && !r->error; t++)
            for (uint32_t f = 0; f < h->factors && !r->error; f++) {
                const float *w = read_factor(r, k, (int)f);
                if (factors) l->factors[t * h->factors + f] = w;
            }
        l->bias = numbers(r, (int)h->dtype, (uint64_t)CELL[h->cell].rows, N, padded);
        l->state = room(r, 4 * (uint64_t)CELL[h->cell].states * padded);
        if (!plain) l->out = read_map(r, k, O * N, rank, n, 0);
        if (!plain && h->rank) l->widen = read_map(r, k, rank, D, 1, 0);
        if (I) {
            l->ff_norm = numbers(r, (int)h->dtype, 1, D, D);
            l->gate_up = read_map(r, k, D, 2 * I, n, 0);
            l->down = read_map(r, k, I, D, n, 0);
        }
    }
    k->norm = plain ? NULL : numbers(r, (int)h->dtype, 1, D, D);
    k->head = read_map(r, k, plain ? O * N : D, h->outputs, 1, (h->flags & HEAD_BIAS) != 0);
    if (h->head == KRU_CHAIN) {
        k->before = read_map(r, k, h->input_size, h->outputs, 1, 0);
        k->lower = rows(r, (int)h->dtype, h->input_size, h->outputs - h->input_size);
        k->keys = rows(r, (int)h->dtype, h->input_size, h->outputs - h->input_size);
        k->near = rows(r, (int)h->dtype, 2 * WINDOW, h->channels);
        k->near_context = rows(r, (int)h->dtype, h->channels, h->outputs - h->input_size);
        k->near_bias = numbers(r, (int)h->dtype, 1, h->channels, h->channels);
        k->near_out = rows(r, (int)h->dtype, 1, h->channels);
    }
    const uint8_t *zeros = take(r, 64);
    for (int i = 0; zeros && i < 64; i++)
        if (zeros[i]) r->error = "the file does not end in 64 zeros";
    if (!r->error && r->at != r->end) r->error = "there are bytes after the last tensor";

    uint64_t most = K * N > E ? K * N : E; /* widest input of a map that has terms */
    uint64_t inputs = O * N > D ? O * N : D;
    if (2 * I > inputs) inputs = 2 * I;
    if (h->input_size > inputs) inputs = h->input_size;
    if (rank > inputs) inputs = rank;
    k->x = room(r, 4 * (most > D ? most : D));
    k->u = room(r, 4 * most);
    k->wide = room(r, 4 * (inputs > most ? inputs : most));
    k->features = room(r, 4 * (inputs > most ? inputs : most));
    k->z = room(r, 4 * K * padded);
    k->term = room(r, 4 * K * padded);
    k->ping = room(r, 4 * K * widest);
    k->pong = room(r, 4 * K * widest);
    k->logits = room(r, 4 * (uint64_t)h->outputs);
    k->mixed = room(r, 4 * n * inputs);
    k->row_scales = room(r, 4 * n);
    k->hidden = room(r, 4 * (uint64_t)h->outputs);
    k->scores = room(r, 4 * ((uint64_t)h->input_size + 1));
    k->seen = room(r, 4 * (uint64_t)h->input_size * h->channels);
    k->units = room(r, 4 * (uint64_t)h->input_size * h->channels);
    k->coded = room(r, 2 * n * (inputs + 2 * n));
}

static const char *open_model(const void *file, size_t bytes, void *memory, kru *k, uint64_t *used) {
    reader r = {(const uint8_t *)file + sizeof(header), (const uint8_t *)file + bytes, memory, 0, NULL};
    const uint32_t one = 1;
    if (*(const uint8_t *)&one != 1) return "weight files are for little-endian machines";
    if ((uintptr_t)file % 4 || (uintptr_t)memory % 8) return "the file, or the memory, is not at an address that 8 divides";
    if (bytes < sizeof(header)) return "the file is shorter than a header";
    memcpy(&k->h, file, sizeof(header));
    const char *wrong = check_header(&k->h, bytes);
    if (wrong) return wrong;
    if (!memory && crc32((const uint8_t *)file + 12, bytes - 12) != k->h.crc)
        return "the file is damaged: its checksum is another";
    room(&r, sizeof(kru));
    read_model(&r, k);
    *used = r.used;
    return r.error;
}

/* ---- sampling -------------------------------------------------------------------------------------------------- */
/* exp of x, as in squash below, within 2 units of the last place; 0 below -87. */
static float exp_of(float x) {
    if (!(x > -87.0f)) return 0.0f;
    if (x > 88.0f) x = 88.0f;
    float turns = (float)(int)(x * 1.44269504088896341f + (x < 0 ? -0.5f : 0.5f));
    float r = x - turns * 0.693359375f + turns * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * (r * r) + r + 1.0f;
    union {
        uint32_t u;
        float f;
    } power = {(uint32_t)((int)turns + 127) << 23};
    return p * power.f;
}

#if !defined(KRU_NEON) && !defined(KRU_WASM) /* those have an instruction */
/* The square root of x >= 0, without a library. */
static float root_of(float x) {
    union {
        float f;
        uint32_t u;
    } y = {x};
    if (!(x > 0)) return x;
    y.u = 0x1fbd1df5u + (y.u >> 1);
    for (int i = 0; i < 3; i++) y.f = 0.5f * (y.f + x / y.f);
    return y.f;
}
#endif

static double uniform(uint64_t *seed) { /* splitmix64 */
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

int kru_sample(const float *logits, int count, float temperature, float top_p, uint64_t *seed) {
    int best = 0;
    double total = 0, kept = 0;
    float low = 0, high = 1;
    for (int i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    if (!(temperature > 0)) return best;
    const float largest = logits[best], inverse = 1.0f / temperature;
#define SHARE(i) exp_of((logits[i] - largest) * inverse) /* of the largest one's probability */
    for (int i = 0; i < count; i++) total += SHARE(i);
    for (int turn = 0; top_p < 1 && turn < 24; turn++) { /* the highest bar above which there is enough */
        float bar = 0.5f * (low + high);
        double sum = 0;
        for (int i = 0; i < count; i++)
            if (SHARE(i) >= bar) sum += SHARE(i);
        if (sum >= top_p * total)
            low = bar;
        else
            high = bar;
    }
    for (int i = 0; i < count; i++)
        if (SHARE(i) >= low) kept += SHARE(i);
    double draw = uniform(seed) * kept;
    for (int i = 0; i < count; i++)
        if (SHARE(i) >= low) {
            best = i;
            if ((draw -= SHARE(i)) < 0) break;
        }
#undef SHARE
    return best;
}

/* log of x > 0, by Cephes' polynomial. */
static float log_of(float x) {
    union {
        float f;
        uint32_t u;
    } m = {x};
    int e = (int)(m.u >> 23) - 126;
    m.u = (m.u & 0x7fffffu) | 0x3f000000u; /* 1/2 to 1 */
    if (m.f < 0.707106781186547524f) m.f *= 2, e--;
    const float r = m.f - 1, z = r * r;
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f, p = p * r + 1.1676998740e-1f, p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f, p = p * r - 1.6668057665e-1f, p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f, p = p * r + 3.3333331174e-1f;
    return r + (p * r * z - 0.5f * z) + (float)e * 0.693147180559945f;
}
static float log_sigmoid(float x) { return x < 0 ? x - log_of(1 + exp_of(x)) : -log_of(1 + exp_of(-x)); }

/* What the windows of all keys see of the frame before the one that is drawn; the context (a, c) is in k->logits. */
static void see_frame(kru *k, const float *frame) {
    const int width = (int)k->h.input_size, H = (int)k->h.outputs - width, C = (int)k->h.channels;
    for (int i = 0; i < width; i++)
        for (int c = 0; c < C; c++) {
            float sum = k->near_bias[c];
            for (int j = 0; i == 0 && j < H; j++) { /* the same for all keys */
                const float hidden = k->logits[width + j];
                sum += k->near_context[c * H + j] * (hidden > 0 ? hidden : 0);
            }
            k->seen[i * C + c] = i ? k->seen[c] : sum;
        }
    for (int j = 0; j < width; j++)
        for (int i = j - OCTAVE; frame[j] != 0 && i <= j + OCTAVE; i++)
            for (int c = 0; i >= 0 && i < width && c < C; c++)
                k->seen[i * C + c] += frame[j] * k->near[(j - i + OCTAVE) * C + c];
}

/* A key's logit given the lower keys, whose share of the chain is in k->hidden and k->units. */
static float key_logit(const kru *k, int key) {
    const int H = (int)(k->h.outputs - k->h.input_size), C = (int)k->h.channels;
    float sum = k->logits[key];
    for (int i = 0; i < H; i++) sum += k->keys[(size_t)key * H + i] * (k->hidden[i] > 0 ? k->hidden[i] : 0);
    for (int i = 0; i < C; i++) sum += k->near_out[i] * (k->units[key * C + i] > 0 ? k->units[key * C + i] : 0);
    return sum;
}
static void start_chain(kru *k) {
    const size_t width = k->h.input_size, C = k->h.channels;
    memcpy(k->hidden, k->logits + width, 4 * (k->h.outputs - width));
    memcpy(k->units, k->seen, 4 * width * C);
}
static void sound_key(kru *k, int key) {
    const int width = (int)k->h.input_size, H = (int)k->h.outputs - width, C = (int)k->h.channels;
    for (int i = 0; i < H; i++) k->hidden[i] += k->lower[(size_t)key * H + i];
    for (int i = key + 1; i < width && i <= key + WINDOW; i++)
        for (int c = 0; c < C; c++) k->units[i * C + c] += k->near[(WINDOW + key - i + WINDOW) * C + c];
}

/* Keys from low to high, `least` to `most` of them; returns how many. */
static int draw_keys(kru *k, float temperature, float heat, float top_p, int least, int most, uint64_t *seed, float *frame) {
    const int width = (int)k->h.input_size;
    int count = 0, lowest = 0;
    memset(frame, 0, 4 * (size_t)width);
    start_chain(k);
    while (lowest < width && count < most) {
        const int missing = least > count ? least - count : 0;
        float silent = 0; /* log p that all keys from `lowest` on are silent so far */
        for (int i = 0; i < width; i++) {
            k->scores[i] = -3e38f;
            if (i < lowest) continue;
            const float logit = key_logit(k, i) / heat;
            if (i <= width - missing) k->scores[i] = silent + log_sigmoid(logit);
            silent += log_sigmoid(-logit);
        }
        k->scores[width] = missing ? -3e38f : silent;
        const int key = kru_sample(k->scores, width + 1, temperature, top_p, seed);
        if (key == width) break;
        frame[key] = 1, count++, lowest = key + 1;
        sound_key(k, key);
    }
    return count;
}

int kru_draw(kru *k, float temperature, float top_p, int least, int most, uint64_t *seed, float *frame) {
    const int width = (int)k->h.input_size, chain = k->h.head == KRU_CHAIN;
    if (!chain && k->h.head != KRU_ROLL) return -1;
    if (most > width) most = width;
    const float heat = chain ? 1 : temperature > 1e-4f ? temperature : 1e-4f; /* independent keys: each key's own */
    if (!chain && temperature > 0) temperature = 1;
    for (int i = 0; i < 64 && temperature > 0; i++) {
        const int count = draw_keys(k, temperature, heat, top_p, 0, width, seed, frame);
        if (count >= least && count <= most) return 0;
    }
    draw_keys(k, temperature, heat, top_p, least, most, seed, frame);
    return 1;
}

float kru_nats(kru *k, const float *frame) {
    float nats = 0;
    start_chain(k);
    for (int i = 0; i < (int)k->h.input_size; i++) {
        const float logit = key_logit(k, i);
        nats -= log_sigmoid(frame[i] > 0.5f ? logit : -logit);
        if (frame[i] > 0.5f) sound_key(k, i);
    }
    return nats;
}

/* ---- what computes, for each width ------------------------------------------------------------------------------ */
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#ifdef KRU_X86
#define KRU_LANES 16
#include "kru_run.inc"
#undef KRU_LANES
#define KRU_LANES 8
#include "kru_run.inc"
#undef KRU_LANES
#endif
#ifdef KRU_SCALAR
#define KRU_LANES 1
#else
#define KRU_LANES 4
#endif
#include "kru_run.inc"
#undef KRU_LANES

typedef const float *(*runner)(kru *);
static runner pick(const char **name) {
#ifdef KRU_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return *name = "avx512", run_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *name = "avx2", run_avx2;
#endif
#if defined(KRU_NEON)
    *name = "neon";
#elif defined(KRU_WASM)
    *name = "simd128";
#elif defined(KRU_SCALAR)
    *name = "scalar";
#else
    *name = "generic";
#endif
    return run_generic;
}

/* ---- interface --------------------------------------------------------------------------------------------------- */
const char *kru_instructions(void) {
    const char *name;
    pick(&name);
    return name;
}

const char *kru_check(const void *file, size_t bytes, size_t *memory) {
    kru k;
    uint64_t used = 0;
    memset(&k, 0, sizeof k);
    const char *wrong = open_model(file, bytes, NULL, &k, &used);
    if (!wrong && used > SIZE_MAX / 2) wrong = "the model needs more memory than this machine can address";
    *memory = wrong ? 0 : (size_t)used;
    return wrong;
}

kru *kru_open(const void *file, size_t bytes, void *memory) {
    kru *k = memory;
    size_t needed;
    uint64_t used;
    const char *name;
    if (!memory || kru_check(file, bytes, &needed)) return NULL;
    memset(memory, 0, needed);
    if (open_model(file, bytes, memory, k, &used)) return NULL;
    k->run = pick(&name);
    return k;
}

enum kru_head kru_kind(const kru *k) { return (enum kru_head)k->h.head; }
int kru_vocabulary(const kru *k) { return (int)k->h.vocabulary; }
int kru_inputs(const kru *k) { return (int)k->h.input_size; }
int kru_outputs(const kru *k) { return (int)k->h.outputs; }

const float *kru_step(kru *k, int token) {
    if (!k->table || token < 0 || token >= (int)k->h.vocabulary) return NULL;
    memcpy(k->x, k->table + (size_t)token * k->h.embedding, 4 * (size_t)k->h.embedding);
    return k->run(k);
}

int kru_sequence(kru *k, const int32_t *tokens, const float *frames, size_t steps, float *outputs) {
    for (size_t t = 0; t < steps; t++) {
        const float *y = tokens ? kru_step(k, tokens[t]) : kru_frame(k, frames + t * k->h.input_size);
        if (!y) return -1;
        memcpy(outputs + t * k->h.outputs, y, 4 * (size_t)k->h.outputs);
    }
    return 0;
}

int kru_generate(kru *k, int count, float temperature, float top_p, uint64_t *seed, int32_t *tokens) {
    if (k->h.head != KRU_TEXT) return -1;
    for (int i = 0; i < count; i++) {
        tokens[i] = kru_sample(k->logits, (int)k->h.outputs, temperature, top_p, seed);
        if (!kru_step(k, tokens[i])) return -1;
    }
    return 0;
}

/* The state lies in planes of padded N floats; outside it has none in between, but `skip` floats after each layer. */
static void move_state(const kru *k, float *to, const float *from, size_t skip) {
    size_t N = k->h.state;
    for (uint32_t i = 0; i < k->h.layers; i++, to = to ? to + skip : to, from = from ? from + skip : from)
        for (int s = 0; s < CELL[k->h.cell].states; s++) {
            float *plane = k->layers[i].state + s * k->padded;
            if (to) memcpy(to, plane, 4 * N), to += N;
            if (from) memcpy(plane, from, 4 * N), from += N;
            if (!to && !from) memset(plane, 0, 4 * (size_t)k->padded);
        }
}
void kru_reset(kru *k) { move_state(k, NULL, NULL, 0); }
int kru_state_size(const kru *k) { return (int)(k->h.layers * k->h.state) * CELL[k->h.cell].states; }
void kru_get_state(const kru *k, float *state) { move_state(k, state, NULL, 0); }
void kru_set_state(kru *k, const float *state) { move_state(k, NULL, state, 0); }

int kru_rows(kru *k, int rows, const int64_t *tokens, float *states, float *outputs) {
    const size_t width = k->h.outputs, each = (size_t)CELL[k->h.cell].states * k->h.state, skip = (size_t)(rows - 1) * each;
    for (int i = 0; i < rows; i++)
        if (!k->table || tokens[i] < 0 || tokens[i] >= (int64_t)k->h.vocabulary) return -1;
    for (int i = 0; i < rows; i++) {
        move_state(k, NULL, states + i * each, skip);
        memcpy(outputs + i * width, kru_step(k, (int)tokens[i]), 4 * width);
        move_state(k, states + i * each, NULL, skip);
    }
    return 0;
}

const char *kru_text(const kru *k, int token, int *bytes) {
    const char *at = k->texts;
    *bytes = 0;
    if (!k->h.text_bytes || token < 0 || token >= (int)k->h.vocabulary) return NULL;
    while (token--) at += 1 + (uint8_t)*at;
    *bytes = (uint8_t)*at;
    return at + 1;
}

int kru_token(const kru *k, const char *text, int length, int *bytes) {
    const char *at = k->texts;
    int found = -1;
    *bytes = 0;
    for (int t = 0; k->h.text_bytes && t < (int)k->h.vocabulary; at += 1 + (uint8_t)*at, t++) {
        int n = (uint8_t)*at;
        if (n > *bytes && n <= length && !memcmp(at + 1, text, (size_t)n)) found = t, *bytes = n;
    }
    return found;
}
