/* Kernels of the gated cells for one vector width: included after kru_kernel.h with the same macros.
 * Lanes over samples: entry i of an array is a vector that holds it for the VL samples of a group. Every factor size
 * then fills the vectors, and a pass over factor f multiplies whole vectors by scalars wherever f stands in the product.
 * A column is one (l, r) of x[l,q,r]: Q vectors, `s` floats apart. */

/* ---- vectors from and to rows of samples -------------------------------------------------------------------- */
#if VL == 16
#define LOW_HALVES ((vi){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define HIGH_HALVES ((vi){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#elif VL == 8
#define LOW_HALVES ((vi){0, 8, 1, 9, 2, 10, 3, 11})
#define HIGH_HALVES ((vi){4, 12, 5, 13, 6, 14, 7, 15})
#else
#define LOW_HALVES ((vi){0, 4, 1, 5})
#define HIGH_HALVES ((vi){2, 6, 3, 7})
#endif

/* VL x VL transposition: log2(VL) perfect shuffles of rows i and i + VL/2. */
INL void FN(transpose)(vf *a) {
    vf b[VL];
#pragma GCC unroll 4
    for (int k = 1; k < VL; k *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < VL / 2; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + VL / 2], LOW_HALVES);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + VL / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) a[i] = b[i];
    }
}

/* tile[u] = lanes src[s*stride + u] for u < m and samples s < n; the other lanes are zero. */
KFN void FN(gather)(const float *src, int64_t stride, int n, int m, vf *tile) {
    vf a[VL];
    if (n == VL && m == VL) {
#pragma GCC unroll 16
        for (int s = 0; s < VL; s++) a[s] = FN(load)(src + s * stride);
    } else
        for (int s = 0; s < VL; s++) a[s] = s < n ? FN(get)(src + s * stride, m) : (vf){0};
    FN(transpose)(a);
    memcpy(tile, a, sizeof a);
}

/* The way back; `dst` may be NULL. Returns the sum over samples of each of the m units. */
KFN vf FN(scatter)(const vf *tile, float *dst, int64_t stride, int n, int m) {
    vf a[VL];
    memcpy(a, tile, sizeof a);
    FN(transpose)(a);
    if (dst && n == VL && m == VL) {
#pragma GCC unroll 16
        for (int s = 0; s < VL; s++) FN(store)(dst + s * stride, a[s]);
    } else if (dst)
        for (int s = 0; s < n; s++) FN(put)(dst + s * stride, a[s], m);
    for (int k = VL / 2; k > 0; k /= 2)
        for (int s = 0; s < k; s++) a[s] += a[s + k];
    return a[0];
}

/* ---- sigmoid and tanh --------------------------------------------------------------------------------------- */
#if defined(ISA_AVX512)
/* A NaN in x is kept: the instruction returns its second operand. */
INL vf FN(clamp)(vf x, float lo, float hi) {
    return (vf)_mm512_max_ps(_mm512_set1_ps(lo), _mm512_min_ps(_mm512_set1_ps(hi), (__m512)x));
}
INL vf FN(reciprocal)(vf x) { /* 14 bits and one Newton step; x is finite, at least 1, or NaN */
    vf y = (vf)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y); /* never a product that falls below the normal numbers */
}
#else
INL vf FN(clamp)(vf x, float lo, float hi) {
    vf l = (vf){0} + lo, h = (vf){0} + hi;
    x = FN(pick)((vi)(x < l), l, x);
    return FN(pick)((vi)(x > h), h, x);
}
INL vf FN(reciprocal)(vf x) { return 1.0f / x; }
#endif

/* sigmoid, or tanh, of `count` vectors, in place; those up to a multiple of four are computed too. Four go through each
 * step together, for every step waits for the one before.
 * exp(y) - 1 = s p + (s - 1) with y = k log 2 + r, s = 2^k and p = exp(r) - 1, |r| <= log(2) / 2, by Cephes' polynomial.
 * Adding 1.5 * 2^23 rounds to the integer k and leaves it in the low bits. */
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
INL void FN(squash)(const int tanh, int count, vf *values) {
    const float magic = 12582912.0f;
    for (vf *x = values; x < values + count; x += 4) {
        vf y[4], k[4], s[4], p[4];
        EACH y[i] = tanh ? FN(clamp)(x[i], -10.0f, 10.0f) * 2.0f : -FN(clamp)(x[i], -87.0f, 87.0f);
        EACH k[i] = y[i] * 1.44269504088896341f + magic;
        EACH s[i] = (vf)(((vi)k[i] << 23) + 0x3f800000);
        EACH k[i] -= magic;
        EACH y[i] -= k[i] * 0.693359375f;
        EACH y[i] += k[i] * 2.12194440e-4f;
        EACH p[i] = 1.9875691500e-4f * y[i] + 1.3981999507e-3f;
        EACH p[i] = p[i] * y[i] + 8.3334519073e-3f;
        EACH p[i] = p[i] * y[i] + 4.1665795894e-2f;
        EACH p[i] = p[i] * y[i] + 1.6666665459e-1f;
        EACH p[i] = p[i] * y[i] + 5.0000001201e-1f;
        EACH p[i] = p[i] * (y[i] * y[i]) + y[i];
        /* 1 / (1 + exp(-x)), and (exp(2x) - 1) / (exp(2x) + 1), which keeps the digits of a small x */
        EACH p[i] = s[i] * p[i] + (s[i] + (tanh ? -1.0f : 1.0f));
        EACH y[i] = FN(reciprocal)(tanh ? p[i] + 2.0f : p[i]);
        EACH x[i] = tanh ? p[i] * y[i] : y[i];
    }
}
#undef EACH
KFN void FN(sigmoid)(int count, vf *x) { FN(squash)(0, count, x); }
KFN void FN(tanh)(int count, vf *x) { FN(squash)(1, count, x); }

/* ---- one stage ---------------------------------------------------------------------------------------------- */
#if WIDE
#define ROW_CASES(X) X(1, 4) X(2, 4) X(3, 4) X(4, 4) X(5, 4) X(6, 4) X(7, 3) X(8, 3) X(9, 2) X(10, 2) X(11, 2) X(12, 2)
#define GRAD_MAX 5
#define GRAD_CASES(X)                                                                                              \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(2, 1) X(2, 2) X(2, 3) X(2, 4) X(2, 5) X(3, 1) X(3, 2) X(3, 3) X(3, 4)  \
    X(3, 5) X(4, 1) X(4, 2) X(4, 3) X(4, 4) X(4, 5) X(5, 1) X(5, 2) X(5, 3) X(5, 4) X(5, 5)
#define LARGE_ROWS 8
#else
#define ROW_CASES(X) X(1, 4) X(2, 4) X(3, 3) X(4, 2) X(5, 2) X(6, 2)
#define GRAD_MAX 3
#define GRAD_CASES(X) X(1, 1) X(1, 2) X(1, 3) X(2, 1) X(2, 2) X(2, 3) X(3, 1) X(3, 2) X(3, 3)
#define LARGE_ROWS 4
#endif

/* PB rows of y = W x (or y += W x) for CB columns; column c of x begins at x + c*xc. */
INL void FN(columns_core)(const int PB, const int CB, const int add, int64_t Q, const float *w, const float *x,
                          int64_t xc, float *y, int64_t yc, int64_t s) {
    vf acc[12][4];
#pragma GCC unroll 12
    for (int j = 0; j < PB; j++)
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) acc[j][c] = add ? FN(load)(y + c * yc + j * s) : (vf){0};
    for (int64_t q = 0; q < Q; q++, w += PB, x += s) {
        vf v[4];
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) v[c] = FN(load)(x + c * xc);
#pragma GCC unroll 12
        for (int j = 0; j < PB; j++) {
            float k = w[j];
#pragma GCC unroll 4
            for (int c = 0; c < CB; c++) acc[j][c] += k * v[c];
        }
    }
#pragma GCC unroll 12
    for (int j = 0; j < PB; j++)
#pragma GCC unroll 4
        for (int c = 0; c < CB; c++) FN(store)(y + c * yc + j * s, acc[j][c]);
}

/* M columns, all of p. */
INL void FN(columns_any)(const int add, int64_t M, int64_t P, int64_t Q, const float *w, const float *x, int64_t xc,
                         float *y, int64_t yc, int64_t s) {
    int64_t blocks = ceil_div(P, gated_rows(VL));
    for (int64_t k = 0; k < blocks; k++) {
        int64_t p = k * P / blocks, pb = (k + 1) * P / blocks - p, m = 0;
        const float *wp = w + p * Q;
        float *yp = y + p * s;
        switch (pb) {
#define ROW_CASE(PB, CB)                                                                                           \
    case PB:                                                                                                       \
        for (; m + CB <= M; m += CB) FN(columns_core)(PB, CB, add, Q, wp, x + m * xc, xc, yp + m * yc, yc, s);      \
        for (; m < M; m++) FN(columns_core)(PB, 1, add, Q, wp, x + m * xc, xc, yp + m * yc, yc, s);                 \
        break;
            ROW_CASES(ROW_CASE)
        }
    }
}
KFN void FN(columns)(int64_t M, int64_t P, int64_t Q, const float *w, const float *x, int64_t xc, float *y, int64_t yc,
                     int64_t s) {
    FN(columns_any)(0, M, P, Q, w, x, xc, y, yc, s);
}
KFN void FN(columns_add)(int64_t M, int64_t P, int64_t Q, const float *w, const float *x, int64_t xc, float *y,
                         int64_t yc, int64_t s) {
    FN(columns_any)(1, M, P, Q, w, x, xc, y, yc, s);
}

/* acc[p,q,VL] += g[p] x[q] over M columns, not summed over lanes; acc's rows are Q vectors long. */
INL void FN(grad_core)(const int PB, const int QB, int64_t M, int64_t Q, const float *g, int64_t gc, const float *x,
                       int64_t xc, int64_t s, float *acc) {
    vf sum[5][5];
#pragma GCC unroll 5
    for (int i = 0; i < PB; i++)
#pragma GCC unroll 5
        for (int j = 0; j < QB; j++) sum[i][j] = FN(load)(acc + (i * Q + j) * VL);
    for (int64_t m = 0; m < M; m++, g += gc, x += xc) {
        vf a[5];
#pragma GCC unroll 5
        for (int i = 0; i < PB; i++) a[i] = FN(load)(g + i * s);
#pragma GCC unroll 5
        for (int j = 0; j < QB; j++) {
            vf b = FN(load)(x + j * s);
#pragma GCC unroll 5
            for (int i = 0; i < PB; i++) sum[i][j] += a[i] * b;
        }
    }
#pragma GCC unroll 5
    for (int i = 0; i < PB; i++)
#pragma GCC unroll 5
        for (int j = 0; j < QB; j++) FN(store)(acc + (i * Q + j) * VL, sum[i][j]);
}

KFN void FN(grad)(int64_t M, int64_t P, int64_t Q, const float *g, int64_t gc, const float *x, int64_t xc, int64_t s,
                  float *acc) {
    int64_t rows = ceil_div(P, GRAD_MAX), columns = ceil_div(Q, GRAD_MAX);
    for (int64_t k = 0; k < rows; k++) {
        int64_t p = k * P / rows, pb = (k + 1) * P / rows - p;
        for (int64_t h = 0; h < columns; h++) {
            int64_t q = h * Q / columns, qb = (h + 1) * Q / columns - q;
            switch (pb * 8 + qb) {
#define GRAD_CASE(PB, QB)                                                                                          \
    case PB * 8 + QB: FN(grad_core)(PB, QB, M, Q, g + p * s, gc, x + q * s, xc, s, acc + (p * Q + q) * VL); break;
                GRAD_CASES(GRAD_CASE)
            }
        }
    }
}

/* The same for a large stage, summed over lanes at once: acc is (P, Q padded), `x` is transposed to rows of samples. */
KFN void FN(grad_large)(int64_t M, int64_t P, int64_t Q, const float *g, int64_t gc, const float *x, int64_t xc,
                        int64_t s, float *acc) {
    int64_t Qp = round_up(Q, VL);
    for (int64_t m = 0; m < M; m++, g += gc, x += xc)
        for (int64_t q = 0; q < Q; q += VL) {
            vf a[VL];
            for (int u = 0; u < VL; u++) a[u] = q + u < Q ? FN(load)(x + (q + u) * s) : (vf){0};
            FN(transpose)(a);
            for (int64_t p = 0; p < P; p += LARGE_ROWS) {
                int rows = P - p < LARGE_ROWS ? (int)(P - p) : LARGE_ROWS;
                float *to = acc + p * Qp + q;
                const float *from = g + p * s;
                if (rows == LARGE_ROWS) {
                    vf sum[LARGE_ROWS];
#pragma GCC unroll 8
                    for (int i = 0; i < LARGE_ROWS; i++) sum[i] = FN(load)(to + i * Qp);
#pragma GCC unroll 16
                    for (int u = 0; u < VL; u++)
#pragma GCC unroll 8
                        for (int i = 0; i < LARGE_ROWS; i++) sum[i] += from[i * s + u] * a[u];
#pragma GCC unroll 8
                    for (int i = 0; i < LARGE_ROWS; i++) FN(store)(to + i * Qp, sum[i]);
                } else
                    for (int i = 0; i < rows; i++) {
                        vf sum = FN(load)(to + i * Qp);
                        for (int u = 0; u < VL; u++) sum += from[i * s + u] * a[u];
                        FN(store)(to + i * Qp, sum);
                    }
            }
        }
}

/* Fetches the next f->lines cache lines. */
INL void FN(fetch_some)(gated_fetches *f) {
    int64_t left = f->lines;
    while (left > 0 && f->current < f->count) {
        const gated_range *r = &f->range[f->current];
        const float *p = r->from + f->row * r->stride;
        int64_t end = f->at + 16 * left < r->floats ? f->at + 16 * left : r->floats, at = f->at;
        if (r->write)
            for (; at < end; at += 16, left--) __builtin_prefetch(p + at, 1, 2);
        else
            for (; at < end; at += 16, left--) __builtin_prefetch(p + at, 0, 2);
        f->at = at;
        if (at >= r->floats) {
            f->at = 0;
            if (++f->row == r->rows) {
                f->row = 0;
                f->current++;
            }
        }
    }
}

/* Columns of one tile: what several register blocks read again stays in the first cache. */
INL int64_t FN(tile)(const gated_stage *st) {
    int64_t m = 512 / (st->P + st->Q) / 12 * 12;
    return m > 12 ? m : 12;
}

/* Spreads the ranges over the tiles of a product of all gates. */
KFN void FN(fetch_plan)(const gated_plan *plan, gated_fetches *f) {
    int64_t tiles = 0, lines = 0;
    for (int s = 0; s < plan->S; s++) {
        const gated_stage *st = &plan->stage[s];
        int64_t M = st->right == 1 ? st->left : st->right;
        tiles += plan->G * (st->right == 1 ? 1 : st->left) * ceil_div(M, FN(tile)(st));
    }
    f->count = f->current = 0;
    f->row = f->at = 0;
    for (int i = 0; i < 4; i++)
        if (f->range[i].from) {
            f->range[f->count] = f->range[i];
            lines += f->range[f->count].rows * ceil_div(f->range[f->count].floats, 16);
            f->count++;
        }
    f->lines = ceil_div(lines, tiles);
}

/* y = W x for all columns. */
KFN void FN(stage)(const gated_stage *st, const float *w, const float *x, float *y, gated_fetches *fetches) {
    int64_t P = st->P, Q = st->Q, R = st->right, step = FN(tile)(st), lines = R == 1 ? 1 : st->left;
    int64_t xc = R == 1 ? Q * VL : VL, yc = R == 1 ? P * VL : VL, M = R == 1 ? st->left : R;
    for (int64_t l = 0; l < lines; l++, x += Q * R * VL, y += P * R * VL)
        for (int64_t m = 0; m < M; m += step) {
            FN(fetch_some)(fetches);
            FN(columns)(M - m < step ? M - m : step, P, Q, w, x + m * xc, xc, y + m * yc, yc, R * VL);
        }
}

/* g: gradient of the output. acc: gradient of the weights. dx = W' g, or dx += W' g. */
KFN void FN(stage_back)(const gated_stage *st, const float *wt, const float *x, const float *g, float *dx, int add,
                        float *acc, gated_fetches *fetches) {
    int64_t P = st->P, Q = st->Q, R = st->right, step = FN(tile)(st), lines = R == 1 ? 1 : st->left;
    int64_t gc = R == 1 ? P * VL : VL, xc = R == 1 ? Q * VL : VL, M = R == 1 ? st->left : R;
    for (int64_t l = 0; l < lines; l++, g += P * R * VL, x += Q * R * VL, dx += Q * R * VL)
        for (int64_t m = 0; m < M; m += step) {
            int64_t n = M - m < step ? M - m : step;
            FN(fetch_some)(fetches);
            if (st->large)
                FN(grad_large)(n, P, Q, g + m * gc, gc, x + m * xc, xc, R * VL, acc);
            else
                FN(grad)(n, P, Q, g + m * gc, gc, x + m * xc, xc, R * VL, acc);
            if (add)
                FN(columns_add)(n, Q, P, wt, g + m * gc, gc, dx + m * xc, xc, R * VL);
            else
                FN(columns)(n, Q, P, wt, g + m * gc, gc, dx + m * xc, xc, R * VL);
        }
}
