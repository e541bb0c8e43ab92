/* What the engine decides before it computes: which neighbouring factors are merged into one dense stage, in which
 * order the stages are applied, which kernel runs each, and where each keeps its weights. Depends on shapes only.
 *
 * Letters: R terms, M matrices (one complex, or a real one a gate), c numbers an entry (2: complex, 1: real), K = M c
 * planes of the products, F factors (R,K,P_f,Q_f), VL lanes of a vector. */
#include "cells.inc" /* the names of the cells */

#define MAX_FACTORS 64
#define MAX_STAGES MAX_FACTORS
#define MERGE_LIMIT 64 /* a merged stage never grows past this: its cost would outrun what merging saves */
#define LARGE 1024     /* from this many entries on, a real stage's gradient is summed over samples at once */

/* Kernels of a stage. Lanes over units: over r (DIRECT), or over p, and q in the backward, where r is 1 (ROWS). Lanes over
 * samples: SAMPLES, or SAMPLES_LARGE where the gradient has no lanes of its own. */
enum { DIRECT, ROWS, SAMPLES, SAMPLES_LARGE };

typedef struct {
    int64_t P, Q, left, right; /* y[l,p,r] = sum_q W[p,q] x[l,q,r] for one sample */
    int first, last;           /* merged factors [first, last) */
    int kind;
    int64_t tile;            /* columns at a time, of kernels with lanes over samples */
    int64_t w, adjoint, step; /* packed weights of the first matrix, their adjoint, and the step to the next matrix */
    int64_t acc, acc_step;   /* the same of the gradient's accumulator in a thread's workspace */
    int64_t dense;           /* the dense (R,M,P,Q,c) stage in a chunk's gradients */
} kru_stage;

typedef struct {
    int cell, F, S; /* factors, stages */
    int units;      /* lanes over units, else over samples */
    kru_facts facts;
    int64_t N, R, M, c;   /* as above */
    int64_t lanes, group; /* group: samples that advance in lockstep */
    int64_t P[MAX_FACTORS], Q[MAX_FACTORS];
    kru_stage stage[MAX_STAGES];
    int64_t dense_floats, packed_floats, acc_floats, tiles;
    double work; /* estimated vector operations of one step of one group */
} kru_plan;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t span(const int64_t *sizes, int first, int last) { /* the product of sizes [first, last) */
    return first == last ? 1 : sizes[first] * span(sizes, first + 1, last);
}

/* Rows of one register block of the kernels with lanes over samples; P rows are cut into blocks of nearly equal size. */
static int64_t block_rows(int64_t lanes) { return KRU_WIDE(lanes) ? 12 : 6; }

/* Vector operations of one stage. Over units: multiply-adds at full or padded lanes, loads and stores. Over samples, where
 * the place of a stage does not matter: multiply-adds, and what goes through the caches. */
static double stage_cost(const kru_plan *plan, int64_t P, int64_t Q, int64_t left, int64_t right, int *kind) {
    int64_t VL = plan->lanes, c = plan->c;
    if (!plan->units) {
        *kind = P * Q > LARGE ? SAMPLES_LARGE : SAMPLES;
        return (double)left * right * (P * Q + 3.0 * (P + Q)) + 60.0;
    }
    double direct = (double)left * ceil_div(right, VL) * (c * c * P * Q + 1.5 * c * (P + Q));
    double rows = (double)left * ceil_div(P, VL) * (c * c * Q + 3.0 * c);
    *kind = right == 1 && rows < direct ? ROWS : DIRECT;
    return (*kind == ROWS ? rows : direct) + 60.0;
}

/* Groups the factors into stages, by the cheapest sum of costs, and orders the stages. */
static void plan_stages(kru_plan *plan) {
    int F = plan->F, kind, from[MAX_FACTORS + 1];
    double best[MAX_FACTORS + 1] = {0};
    for (int e = 1; e <= F; e++) /* best grouping of factors [0, e): the last group is [s, e) */
        for (int s = e - 1; s >= 0; s--) {
            int64_t P = span(plan->P, s, e), Q = span(plan->Q, s, e);
            if (e - s > 1 && (P > MERGE_LIMIT || Q > MERGE_LIMIT)) break;
            double cost = best[s] + stage_cost(plan, P, Q, span(plan->Q, 0, s), span(plan->Q, e, F), &kind);
            if (s < e - 1 && cost >= best[e]) continue;
            best[e] = cost;
            from[e] = s;
        }
    plan->work = best[F];
    for (int e = F, s; e > 0; e = s) { /* innermost group first */
        s = from[e];
        plan->stage[plan->S++] = (kru_stage){span(plan->P, s, e), span(plan->Q, s, e), .first = s, .last = e};
    }
    /* Shrinking stages first, growing ones last: no intermediate is larger than N (insertion sort, stable). */
    for (int i = 1; i < plan->S; i++)
        for (int j = i; j > 0; j--) {
            kru_stage a = plan->stage[j - 1], b = plan->stage[j];
            if (a.P * b.Q <= b.P * a.Q) break;
            plan->stage[j - 1] = b;
            plan->stage[j] = a;
        }
}

/* Where stage i stands in the product, which kernel runs it and where its weights and gradients lie. */
static void place_stage(kru_plan *plan, int i) {
    kru_stage *st = &plan->stage[i];
    int64_t VL = plan->lanes, matrices = plan->R * plan->M, size = st->P * st->Q, columns;
    st->left = st->right = 1;
    for (int j = 0; j < plan->S; j++) {
        if (j == i) continue;
        int64_t other = j < i ? plan->stage[j].P : plan->stage[j].Q; /* already applied, or not yet */
        if (plan->stage[j].first < st->first)
            st->left *= other;
        else
            st->right *= other;
    }
    stage_cost(plan, st->P, st->Q, st->left, st->right, &st->kind);
    int64_t Pp = round_up(st->P, VL), Qp = round_up(st->Q, VL), rows = st->Q * Pp > st->P * Qp ? st->Q * Pp : st->P * Qp;
    st->step = round_up(plan->c * (st->kind == ROWS ? rows : size), 16);
    st->w = plan->packed_floats;
    st->adjoint = st->w + matrices * st->step;
    plan->packed_floats = st->adjoint + matrices * st->step;
    int64_t acc = st->kind == ROWS ? plan->c * st->Q * Pp : st->kind == SAMPLES_LARGE ? st->P * Qp : plan->c * size * VL;
    st->acc_step = round_up(acc, 16);
    st->acc = plan->acc_floats;
    plan->acc_floats += matrices * st->acc_step;
    st->dense = plan->dense_floats;
    plan->dense_floats += matrices * plan->c * size;
    st->tile = 512 / (st->P + st->Q) / 12 * 12; /* what several register blocks read again stays in the first cache */
    if (st->tile < 12) st->tile = 12;
    columns = st->right == 1 ? st->left : st->right;
    plan->tiles += matrices * (st->right == 1 ? 1 : st->left) * ceil_div(columns, st->tile);
}

/* NULL: out of memory, or no such cell, facts or number of factors. B: samples of a call; what is beyond VL makes no
 * difference. */
static kru_plan *plan_new(int64_t cell, int64_t gates, int64_t rows, int64_t states, int64_t B, int64_t R, int64_t F,
                          const int64_t *P, const int64_t *Q, int64_t lanes) {
    int c = cell < FIRST_REAL ? 2 : 1, own = (int)(c == 2 ? rows : rows - gates);
    int fits = c == 2 ? gates == 2 && states == 2 && rows == 1 : own >= 0 && rows <= MAX_ROWS && states <= MAX_STATES;
    kru_plan *plan = calloc(1, sizeof *plan);
    if (!plan || cell < 0 || cell >= CELL_COUNT || !fits || R < 1 || F < 1 || F > MAX_FACTORS) {
        free(plan);
        return NULL;
    }
    plan->cell = (int)cell;
    plan->facts = (kru_facts){(int)gates, (int)rows, own, (int)states, c};
    plan->c = c;
    plan->M = gates / c;
    plan->R = R;
    plan->F = (int)F;
    plan->lanes = lanes;
    plan->N = 1;
    for (int f = 0; f < F; f++) {
        plan->P[f] = P[f];
        plan->Q[f] = Q[f];
        plan->N *= Q[f];
    }
    plan->units = c == 2 || 2 * B < lanes; /* half the lanes without a sample cost more than factors that do not fill them */
    plan_stages(plan);
    int64_t largest = 1;
    for (int i = 0; i < plan->S; i++) {
        place_stage(plan, i);
        int64_t size = plan->stage[i].P * plan->stage[i].Q;
        if (size > largest) largest = size;
    }
    if (!plan->units)
        plan->group = lanes;
    else { /* large weights are read once for several samples */
        plan->group = largest >= 1024 || plan->N <= 64 ? 4 : 1;
        plan->tiles = plan->N > 1024 ? 0 : plan->S * R; /* long rows the hardware follows by itself */
    }
    plan->work = plan->work * R * plan->M * (plan->units ? plan->group : 1) + 60.0 * plan->N * plan->group / lanes;
    return plan;
}

/* The dense (P,Q,c) product of the factors [first, last) of matrix m of all R M; factor f is (R M,c,P_f,Q_f). */
static void merge(const kru_plan *plan, int first, int last, int64_t m, const float *const *factors, float *out) {
    int64_t P = 1, Q = 1, c = plan->c;
    out[0] = 1;
    out[c - 1] = c == 2 ? 0 : 1;
    for (int f = first; f < last; f++) {
        int64_t p = plan->P[f], q = plan->Q[f];
        const float *re = factors[f] + m * c * p * q, *im = re + (c - 1) * p * q;
        /* in place, from the end: entry (i*p+a, j*q+b) lies at or after (i, j) */
        for (int64_t i = P - 1; i >= 0; i--)
            for (int64_t j = Q - 1; j >= 0; j--) {
                float kr = out[c * (i * Q + j)], ki = out[c * (i * Q + j) + c - 1];
                for (int64_t a = p - 1; a >= 0; a--)
                    for (int64_t b = q - 1; b >= 0; b--) {
                        float *o = out + c * ((i * p + a) * Q * q + j * q + b);
                        float fr = re[a * q + b], fi = im[a * q + b];
                        o[0] = c == 2 ? kr * fr - ki * fi : kr * fr;
                        if (c == 2) o[1] = kr * fi + ki * fr;
                    }
            }
        P *= p;
        Q *= q;
    }
}

/* The gradient `grad` (P,Q,c) of a stage of matrix m, back to its factors: out[f] is (R M,c,P_f,Q_f). An entry of the stage
 * is one of factor f times one of what stands left of it (P,Q) and one of what stands right of it (U,V). */
static void project(const kru_plan *plan, const kru_stage *st, int64_t m, const float *const *factors, const float *grad,
                    float *scratch, float *const *out) {
    const int64_t c = plan->c;
    for (int f = st->first; f < st->last; f++) {
        int64_t p = plan->P[f], q = plan->Q[f], P = span(plan->P, st->first, f), Q = span(plan->Q, st->first, f);
        int64_t U = span(plan->P, f + 1, st->last), V = span(plan->Q, f + 1, st->last);
        float *gr = out[f] + m * c * p * q, *gi = gr + (c - 1) * p * q, *left = scratch, *right = scratch + c * P * Q;
        merge(plan, st->first, f, m, factors, left);
        merge(plan, f + 1, st->last, m, factors, right);
        memset(gr, 0, sizeof(float) * c * p * q);
        for (int64_t i = 0; i < P * Q; i++)
            for (int64_t j = 0; j < U * V; j++) {
                const float *l = left + c * i, *r = right + c * j;
                float kr = c == 2 ? l[0] * r[0] - l[1] * r[1] : l[0] * r[0], ki = c == 2 ? l[0] * r[1] + l[1] * r[0] : 0;
                const float *block = grad + c * ((i / Q * p * U + j / V) * Q * q * V + i % Q * q * V + j % V);
                for (int64_t a = 0; a < p; a++)
                    for (int64_t b = 0; b < q; b++) {
                        const float *d = block + c * (a * U * Q * q * V + b * V);
                        gr[a * q + b] += c == 2 ? kr * d[0] + ki * d[1] : kr * d[0];
                        if (c == 2) gi[a * q + b] += kr * d[1] - ki * d[0];
                    }
            }
    }
}

/* A dense stage (P,Q,c) laid out for its kernel, and its adjoint: (P,Q,c) and (Q,P,c) of DIRECT, (Q,c,P padded) and
 * (P,c,Q padded) of ROWS, (Q,P) and (P,Q) with lanes over samples. */
static void pack(const kru_plan *plan, const kru_stage *st, const float *dense, float *w, float *adjoint) {
    int64_t P = st->P, Q = st->Q, c = plan->c, Pp = round_up(P, plan->lanes), Qp = round_up(Q, plan->lanes);
    memset(w, 0, sizeof(float) * st->step);
    memset(adjoint, 0, sizeof(float) * st->step);
    for (int64_t p = 0; p < P; p++)
        for (int64_t q = 0; q < Q; q++)
            for (int64_t k = 0; k < c; k++, dense++) {
                int64_t row = st->kind == ROWS ? (c * q + k) * Pp + p : c * (p * Q + q) + k;
                int64_t column = st->kind == ROWS ? (c * p + k) * Qp + q : c * (q * P + p) + k;
                w[plan->units ? row : column] = *dense;
                adjoint[plan->units ? column : row] = k ? -*dense : *dense;
            }
}

/* A thread's accumulators to the dense (R,M,P,Q,c) gradient of each stage. */
static void collect(const kru_plan *plan, const float *acc, float *dense) {
    int64_t VL = plan->lanes, c = plan->c;
    for (int s = 0; s < plan->S; s++) {
        const kru_stage *st = &plan->stage[s];
        int64_t P = st->P, Q = st->Q, Pp = round_up(P, VL), Qp = round_up(Q, VL);
        int64_t lanes = st->kind == ROWS || st->kind == SAMPLES_LARGE ? 1 : VL; /* that are still to be summed */
        for (int64_t m = 0; m < plan->R * plan->M; m++) {
            const float *from = acc + st->acc + m * st->acc_step;
            float *to = dense + st->dense + m * P * Q * c;
            for (int64_t p = 0; p < P; p++)
                for (int64_t q = 0; q < Q; q++)
                    for (int64_t k = 0; k < c; k++, to++) {
                        const float *at = from + ((p * Q + q) * c + k) * VL;
                        if (lanes == 1) at = from + (st->kind == ROWS ? (c * q + k) * Pp + p : p * Qp + q);
                        *to = *at;
                        for (int64_t v = 1; v < lanes; v++) *to += at[v];
                    }
        }
    }
}
