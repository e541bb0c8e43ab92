/* What the engine decides before it computes: which neighbouring factors are merged into one dense stage, in which
 * order the stages are applied, which kernel runs each, and where each keeps its weights. Depends on shapes only. */
#ifndef KRU_PLAN_H
#define KRU_PLAN_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define KRU_MAX_FACTORS 64
#define KRU_MERGE_LIMIT 64 /* a merged stage never grows past this: its cost would outrun what merging saves */

enum { KRU_DIRECT = 0, KRU_ROWS = 1 };

typedef struct {
    int64_t P, Q, left, right; /* y[l,p,r] = sum_q W[p,q] x[l,q,r] for one sample */
    int first, last;           /* merged factors [first, last) */
    int kind;                  /* KRU_DIRECT: lanes over r. KRU_ROWS: lanes over p (q in the backward). */
    int64_t dense;             /* offset of the dense (P,Q,2) stage in a chunk's gradient block */
    int64_t w, wh;             /* offsets of W and its adjoint in the packed weights, in the kernel's layout */
    int64_t acc;               /* offset of the weight-gradient accumulator in a thread's workspace */
} kru_stage;

typedef struct {
    int64_t N, lanes, group; /* group: samples that advance in lockstep, so large weights are read once for all */
    int F, S;                /* factors, stages */
    int64_t P[KRU_MAX_FACTORS], Q[KRU_MAX_FACTORS], offset[KRU_MAX_FACTORS];
    kru_stage stage[KRU_MAX_FACTORS];
    int64_t dense_floats, packed_floats, acc_floats, tmp_floats;
    double work; /* estimated vector operations of one step of one sample */
} kru_plan;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* Vector operations of one stage: multiply-adds at full or padded lanes, loads and stores, and the scalar
 * transposition that lanes over p need when the stage is not the innermost one. */
static double stage_cost(int64_t P, int64_t Q, int64_t left, int64_t right, int64_t VL, int *kind) {
    double direct = (double)left * ceil_div(right, VL) * (4.0 * P * Q + 3.0 * (P + Q));
    double rows = (double)left * right * ceil_div(P, VL) * (4.0 * Q + 6.0);
    if (right > 1) rows += 4.0 * left * right * (P + Q);
    *kind = rows < direct ? KRU_ROWS : KRU_DIRECT;
    return (rows < direct ? rows : direct) + 60.0;
}

static void plan_stages(kru_plan *plan) {
    int F = plan->F, kind, from[KRU_MAX_FACTORS + 1];
    double best[KRU_MAX_FACTORS + 1];
    int64_t before[KRU_MAX_FACTORS + 1];
    before[0] = 1;
    for (int f = 0; f < F; f++) before[f + 1] = before[f] * plan->Q[f];
    best[0] = 0;
    for (int e = 1; e <= F; e++) { /* best grouping of factors [0, e): the last group is [s, e) */
        int64_t P = 1, Q = 1;
        best[e] = -1;
        for (int s = e - 1; s >= 0; s--) {
            P *= plan->P[s];
            Q *= plan->Q[s];
            if (e - s > 1 && (P > KRU_MERGE_LIMIT || Q > KRU_MERGE_LIMIT)) break;
            double c = best[s] + stage_cost(P, Q, before[s], before[F] / before[e], plan->lanes, &kind);
            if (best[e] < 0 || c < best[e]) {
                best[e] = c;
                from[e] = s;
            }
        }
    }
    plan->work = best[F];
    plan->S = 0;
    for (int e = F; e > 0; e = from[e]) { /* innermost group first */
        kru_stage *st = &plan->stage[plan->S++];
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
            kru_stage a = plan->stage[j - 1], b = plan->stage[j];
            if (a.P * b.Q <= b.P * a.Q) break;
            plan->stage[j - 1] = b;
            plan->stage[j] = a;
        }
}

static kru_plan *plan_new(int F, const int64_t *P, const int64_t *Q, int64_t lanes) {
    kru_plan *plan = calloc(1, sizeof *plan);
    if (!plan || F < 1 || F > KRU_MAX_FACTORS) {
        free(plan);
        return NULL;
    }
    int64_t VL = lanes, offset = 0;
    plan->lanes = lanes;
    plan->F = F;
    plan->N = 1;
    for (int f = 0; f < F; f++) {
        plan->P[f] = P[f];
        plan->Q[f] = Q[f];
        plan->N *= Q[f];
        plan->offset[f] = offset;
        offset += 2 * P[f] * Q[f];
    }
    plan_stages(plan);
    int64_t largest = 1;
    for (int i = 0; i < plan->S; i++) {
        kru_stage *st = &plan->stage[i];
        st->left = st->right = 1;
        for (int j = 0; j < plan->S; j++) {
            if (j == i) continue;
            int64_t size = j < i ? plan->stage[j].P : plan->stage[j].Q; /* already applied, or not yet */
            if (plan->stage[j].first < st->first)
                st->left *= size;
            else
                st->right *= size;
        }
        stage_cost(st->P, st->Q, st->left, st->right, VL, &st->kind);
        if (st->P * st->Q > largest) largest = st->P * st->Q;
        st->dense = plan->dense_floats;
        plan->dense_floats += 2 * st->P * st->Q;
        int64_t Pp = round_up(st->P, VL), Qp = round_up(st->Q, VL);
        int64_t w = st->kind == KRU_DIRECT ? 2 * st->P * st->Q : 2 * st->Q * Pp;
        int64_t wh = st->kind == KRU_DIRECT ? 2 * st->P * st->Q : 2 * st->P * Qp;
        st->w = plan->packed_floats;
        st->wh = st->w + round_up(w, 16);
        plan->packed_floats = st->wh + round_up(wh, 16);
        st->acc = plan->acc_floats;
        plan->acc_floats += st->kind == KRU_DIRECT ? 2 * st->P * st->Q * VL : round_up(2 * st->Q * Pp, 16);
    }
    plan->group = largest >= 1024 || plan->N <= 64 ? 4 : 1;
    for (int i = 0; i < plan->S; i++) {
        kru_stage *st = &plan->stage[i];
        int64_t most = round_up(st->P > st->Q ? st->P : st->Q, VL);
        int64_t need = 2 * plan->group * st->left * st->right * most + 32 * most;
        if (st->kind == KRU_ROWS && need > plan->tmp_floats) plan->tmp_floats = need;
    }
    return plan;
}

/* Dense (P,Q,2) product of the stage's factors, each (2,P_f,Q_f). */
static void stage_dense(const kru_plan *plan, const kru_stage *st, int last, const float *const *factors, float *out) {
    int64_t P = 1, Q = 1;
    out[0] = 1;
    out[1] = 0;
    for (int f = st->first; f < last; f++) {
        int64_t p = plan->P[f], q = plan->Q[f];
        const float *re = factors[f], *im = re + p * q;
        /* in place, from the end: entry (i*p+a, j*q+b) lies at or after (i, j) */
        for (int64_t i = P - 1; i >= 0; i--)
            for (int64_t j = Q - 1; j >= 0; j--) {
                float kr = out[2 * (i * Q + j)], ki = out[2 * (i * Q + j) + 1];
                for (int64_t a = p - 1; a >= 0; a--)
                    for (int64_t b = q - 1; b >= 0; b--) {
                        float *o = out + 2 * ((i * p + a) * Q * q + j * q + b);
                        float fr = re[a * q + b], fi = im[a * q + b];
                        o[0] = kr * fr - ki * fi;
                        o[1] = kr * fi + ki * fr;
                    }
            }
        P *= p;
        Q *= q;
    }
}

static void pack_stage(const kru_stage *st, int64_t VL, const float *dense, float *w, float *wh) {
    int64_t P = st->P, Q = st->Q, Pp = round_up(P, VL), Qp = round_up(Q, VL);
    if (st->kind == KRU_ROWS) {
        memset(w, 0, sizeof(float) * 2 * Q * Pp);
        memset(wh, 0, sizeof(float) * 2 * P * Qp);
    }
    for (int64_t p = 0; p < P; p++)
        for (int64_t q = 0; q < Q; q++) {
            float re = dense[2 * (p * Q + q)], im = dense[2 * (p * Q + q) + 1];
            if (st->kind == KRU_DIRECT) { /* (P,Q,2) and its adjoint (Q,P,2) */
                w[2 * (p * Q + q)] = re;
                w[2 * (p * Q + q) + 1] = im;
                wh[2 * (q * P + p)] = re;
                wh[2 * (q * P + p) + 1] = -im;
            } else { /* (Q,2,P padded) and its adjoint (P,2,Q padded) */
                w[2 * q * Pp + p] = re;
                w[2 * q * Pp + Pp + p] = im;
                wh[2 * p * Qp + q] = re;
                wh[2 * p * Qp + Qp + q] = -im;
            }
        }
}

/* Gradient of the dense stage `grad` (P,Q,2), destroyed, back to its factors: out[f] is (2,P_f,Q_f). */
static void project_stage(const kru_plan *plan, const kru_stage *st, const float *const *factors, float *grad,
                          float *scratch, float *const *out) {
    for (int f = st->last - 1; f >= st->first; f--) {
        int64_t p = plan->P[f], q = plan->Q[f], P = 1, Q = 1;
        for (int g = st->first; g < f; g++) {
            P *= plan->P[g];
            Q *= plan->Q[g];
        }
        const float *re = factors[f], *im = re + p * q;
        float *gr = out[f], *gi = gr + p * q, *rest = scratch + 2 * P * Q;
        stage_dense(plan, st, f, factors, scratch); /* what stands left of factor f: (P,Q,2) */
        memset(gr, 0, sizeof(float) * 2 * p * q);
        memset(rest, 0, sizeof(float) * 2 * P * Q);
        for (int64_t i = 0; i < P; i++)
            for (int64_t j = 0; j < Q; j++) {
                const float kr = scratch[2 * (i * Q + j)], ki = scratch[2 * (i * Q + j) + 1];
                float rr = 0, ri = 0;
                for (int64_t a = 0; a < p; a++)
                    for (int64_t b = 0; b < q; b++) {
                        const float *d = grad + 2 * ((i * p + a) * Q * q + j * q + b);
                        float fr = re[a * q + b], fi = im[a * q + b];
                        gr[a * q + b] += kr * d[0] + ki * d[1];
                        gi[a * q + b] += kr * d[1] - ki * d[0];
                        rr += fr * d[0] + fi * d[1];
                        ri += fr * d[1] - fi * d[0];
                    }
                rest[2 * (i * Q + j)] = rr;
                rest[2 * (i * Q + j) + 1] = ri;
            }
        memcpy(grad, rest, sizeof(float) * 2 * P * Q);
    }
}
#endif
