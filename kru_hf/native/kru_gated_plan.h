/* The plan of the gated cells: real factors, a set a gate, and lanes over samples. With lanes over samples a stage costs
 * the same wherever it stands in the product, so only the cheapest merging and the order have to be found. */
#ifndef KRU_GATED_PLAN_H
#define KRU_GATED_PLAN_H
#include "kru_plan.h"

/* From this many entries a stage's gradient is accumulated over samples, not a vector of lanes an entry. */
#define GATED_LARGE 1024

typedef struct {
    int64_t P, Q, left, right; /* y[l,p,r] = sum_q W[p,q] x[l,q,r] */
    int first, last;           /* merged factors [first, last) */
    int large;                 /* how its gradient is accumulated: see GATED_LARGE */
    int64_t dense;             /* offset of the dense (G,P,Q) stage in a chunk's gradient block */
    int64_t w, wt, gate;       /* packed weights and transposed weights of gate 0, and the step from gate to gate */
    int64_t acc, acc_gate;     /* the same for the accumulator of the weight gradient */
} gated_stage;

typedef struct {
    int64_t N, G, lanes;
    int F, S; /* factors, stages */
    int64_t P[KRU_MAX_FACTORS], Q[KRU_MAX_FACTORS];
    gated_stage stage[KRU_MAX_FACTORS];
    int64_t dense_floats, packed_floats, acc_floats;
    double work; /* estimated vector operations of one step of a group of samples */
} gated_plan;

static int64_t gated_bias_rows(const gated_plan *plan) { return plan->G == 2 ? 2 : 4; }

/* What the next pass over the gates will read or write, fetched a little at a time while the products are computed: no
 * hardware prefetcher follows samples that lie a sequence apart, and a step fetched at once, or too early, is lost again. */
typedef struct {
    const float *from; /* NULL: nothing */
    int64_t stride, rows, floats;
    int write;
} gated_range;

typedef struct {
    gated_range range[4];
    int count, current;
    int64_t row, at, lines; /* where the next line is, and lines to fetch at a time */
} gated_fetches;

/* Rows of one register block, and how P rows are cut into blocks. Weights are packed in this order. */
#if defined(__aarch64__)
static int64_t gated_rows(int64_t lanes) { return lanes > 0 ? 12 : 0; }
#else
static int64_t gated_rows(int64_t lanes) { return lanes == 16 ? 12 : 6; }
#endif

static void gated_stages(gated_plan *plan) {
    int F = plan->F, from[KRU_MAX_FACTORS + 1];
    double best[KRU_MAX_FACTORS + 1];
    int64_t after[KRU_MAX_FACTORS + 1];
    after[F] = 1;
    for (int f = F - 1; f >= 0; f--) after[f] = after[f + 1] * plan->Q[f];
    best[0] = 0;
    for (int e = 1; e <= F; e++) { /* best grouping of factors [0, e): the last group is [s, e) */
        int64_t P = 1, Q = 1;
        best[e] = -1;
        for (int s = e - 1; s >= 0; s--) {
            P *= plan->P[s];
            Q *= plan->Q[s];
            if (e - s > 1 && (P > KRU_MERGE_LIMIT || Q > KRU_MERGE_LIMIT)) break;
            /* multiply-adds, and what goes through the caches, for each of N / Q columns */
            double c = best[s] + (double)after[0] / Q * (P * Q + 3.0 * (P + Q)) + 60.0;
            if (best[e] < 0 || c < best[e]) {
                best[e] = c;
                from[e] = s;
            }
        }
    }
    plan->work = best[F] * plan->G + 60.0 * plan->N;
    for (int e = F; e > 0; e = from[e]) { /* innermost group first */
        gated_stage *st = &plan->stage[plan->S++];
        st->first = from[e];
        st->last = e;
        st->P = st->Q = 1;
        for (int f = st->first; f < e; f++) {
            st->P *= plan->P[f];
            st->Q *= plan->Q[f];
        }
    }
    /* Shrinking stages first, growing ones last: no intermediate is larger than N (insertion sort, stable). */
    for (int i = 1; i < plan->S; i++)
        for (int j = i; j > 0; j--) {
            gated_stage a = plan->stage[j - 1], b = plan->stage[j];
            if (a.P * b.Q <= b.P * a.Q) break;
            plan->stage[j - 1] = b;
            plan->stage[j] = a;
        }
}

static gated_plan *gated_plan_new(int64_t G, int F, const int64_t *P, const int64_t *Q, int64_t lanes) {
    gated_plan *plan = calloc(1, sizeof *plan);
    if (!plan || F < 1 || F > KRU_MAX_FACTORS) {
        free(plan);
        return NULL;
    }
    plan->G = G;
    plan->lanes = lanes;
    plan->F = F;
    plan->N = 1;
    for (int f = 0; f < F; f++) {
        plan->P[f] = P[f];
        plan->Q[f] = Q[f];
        plan->N *= Q[f];
    }
    gated_stages(plan);
    for (int i = 0; i < plan->S; i++) {
        gated_stage *st = &plan->stage[i];
        st->left = st->right = 1;
        for (int j = 0; j < plan->S; j++) {
            if (j == i) continue;
            int64_t size = j < i ? plan->stage[j].P : plan->stage[j].Q; /* already applied, or not yet */
            if (plan->stage[j].first < st->first)
                st->left *= size;
            else
                st->right *= size;
        }
        int64_t size = st->P * st->Q;
        st->dense = plan->dense_floats;
        plan->dense_floats += G * size;
        st->gate = round_up(size, 16);
        st->w = plan->packed_floats;
        st->wt = st->w + G * st->gate;
        plan->packed_floats = st->wt + G * st->gate;
        st->large = size > GATED_LARGE;
        st->acc_gate = st->large ? st->P * round_up(st->Q, lanes) : size * lanes;
        st->acc = plan->acc_floats;
        plan->acc_floats += round_up(G * st->acc_gate, 16);
    }
    return plan;
}

/* Dense (P,Q) product of the factors [first, last) of one gate; factor f is (G,P_f,Q_f). */
static void gated_dense(const gated_plan *plan, int first, int last, int64_t gate, const float *const *factors,
                        float *out) {
    int64_t P = 1, Q = 1;
    out[0] = 1;
    for (int f = first; f < last; f++) {
        int64_t p = plan->P[f], q = plan->Q[f];
        const float *w = factors[f] + gate * p * q;
        /* in place, from the end: entry (i*p+a, j*q+b) lies at or after (i, j) */
        for (int64_t i = P - 1; i >= 0; i--)
            for (int64_t j = Q - 1; j >= 0; j--) {
                float k = out[i * Q + j];
                for (int64_t a = p - 1; a >= 0; a--)
                    for (int64_t b = q - 1; b >= 0; b--) out[(i * p + a) * Q * q + j * q + b] = k * w[a * q + b];
            }
        P *= p;
        Q *= q;
    }
}

/* (P,Q) of steps (sp, sq) to blocks of rows, each block (Q, rows). */
static void gated_pack_rows(int64_t P, int64_t Q, int64_t sp, int64_t sq, int64_t rows, const float *from, float *to) {
    int64_t blocks = ceil_div(P, rows);
    for (int64_t k = 0; k < blocks; k++)
        for (int64_t q = 0; q < Q; q++)
            for (int64_t p = k * P / blocks; p < (k + 1) * P / blocks; p++) *to++ = from[p * sp + q * sq];
}

/* Gradient of the dense stage `grad` (P,Q) of one gate, destroyed, back to its factors: out[f] is (G,P_f,Q_f). */
static void gated_project(const gated_plan *plan, const gated_stage *st, int64_t gate, const float *const *factors,
                          float *grad, float *scratch, float *const *out) {
    for (int f = st->last - 1; f >= st->first; f--) {
        int64_t p = plan->P[f], q = plan->Q[f], P = 1, Q = 1;
        for (int g = st->first; g < f; g++) {
            P *= plan->P[g];
            Q *= plan->Q[g];
        }
        const float *w = factors[f] + gate * p * q;
        float *dw = out[f] + gate * p * q, *rest = scratch + P * Q;
        gated_dense(plan, st->first, f, gate, factors, scratch); /* what stands left of factor f: (P,Q) */
        memset(dw, 0, sizeof(float) * p * q);
        for (int64_t i = 0; i < P; i++)
            for (int64_t j = 0; j < Q; j++) {
                float k = scratch[i * Q + j], sum = 0;
                for (int64_t a = 0; a < p; a++)
                    for (int64_t b = 0; b < q; b++) {
                        float d = grad[(i * p + a) * Q * q + j * q + b];
                        dw[a * q + b] += k * d;
                        sum += w[a * q + b] * d;
                    }
                rest[i * Q + j] = sum;
            }
        memcpy(grad, rest, sizeof(float) * P * Q);
    }
}
#endif
