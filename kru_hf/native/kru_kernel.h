/* Kernels of one vector width. Included once for each: the includer defines VL (lanes), FN(name), TARGET and
 * exactly one of ISA_AVX512, ISA_AVX2, ISA_GENERIC.
 * A complex array is two float planes; x has rows x[l,q,r] of stride R over q. Every accumulation order is fixed. */
typedef float FN(vf) __attribute__((vector_size(4 * VL)));
typedef float FN(vu) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t FN(vi) __attribute__((vector_size(4 * VL)));
#define vf FN(vf)
#define vi FN(vi)
#define KFN static TARGET
#define INL static inline __attribute__((always_inline)) TARGET

INL vf FN(load)(const float *p) { return (vf)(*(const FN(vu) *)p); }
INL void FN(store)(float *p, vf v) { *(FN(vu) *)p = (FN(vu))v; }

/* First n lanes (n < VL); the others read as zero and are not written. */
#if defined(ISA_AVX512)
INL vf FN(load_n)(const float *p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INL void FN(store_n)(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
INL vf FN(rsqrt)(vf x) { /* 14 bits and one Newton step: within 2 ulp, for normal numbers */
    vf y = (vf)_mm512_rsqrt14_ps((__m512)x);
    return y * (1.5f - 0.5f * x * y * y);
}
#elif defined(ISA_AVX2)
static const int32_t FN(edge)[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INL vf FN(load_n)(const float *p, int n) {
    return (vf)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(FN(edge) + 8 - n)));
}
INL void FN(store_n)(float *p, vf v, int n) {
    _mm256_maskstore_ps(p, _mm256_loadu_si256((const __m256i *)(FN(edge) + 8 - n)), (__m256)v);
}
INL vf FN(rsqrt)(vf x) { return 1.0f / (vf)_mm256_sqrt_ps((__m256)x); }
#else
INL vf FN(load_n)(const float *p, int n) {
    vf v = {0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
INL void FN(store_n)(float *p, vf v, int n) {
    for (int i = 0; i < n; i++) p[i] = v[i];
}
INL vf FN(rsqrt)(vf x) {
    vf y;
    for (int i = 0; i < VL; i++) y[i] = 1.0f / __builtin_sqrtf(x[i]);
    return y;
}
#endif
INL vf FN(get)(const float *p, int n) { return n == VL ? FN(load)(p) : FN(load_n)(p, n); }
INL void FN(put)(float *p, vf v, int n) {
    if (n == VL)
        FN(store)(p, v);
    else
        FN(store_n)(p, v, n);
}
/* Whether the first n lanes are all within lo...hi. */
INL int FN(within)(vf x, float lo, float hi, int n) {
#if defined(ISA_AVX512)
    __mmask16 above = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lo), _CMP_GE_OQ);
    return !((1u << n) - 1 & ~_mm512_mask_cmp_ps_mask(above, (__m512)x, _mm512_set1_ps(hi), _CMP_LE_OQ));
#elif defined(ISA_AVX2)
    vi inside = (vi)(x >= lo) & (vi)(x <= hi);
    return !((1 << n) - 1 & ~_mm256_movemask_ps((__m256)inside));
#else
    int inside = 1;
    for (int i = 0; i < n; i++) inside &= x[i] >= lo && x[i] <= hi;
    return inside;
#endif
}
INL vf FN(pick)(vi c, vf a, vf b) { return (vf)((c & (vi)a) | (~c & (vi)b)); }

/* Register blocks: accumulators come in (re, im) pairs, 32 vector registers with AVX-512 and NEON, 16 otherwise. */
#if defined(ISA_AVX512) || defined(__aarch64__)
#define WIDE 1
#define PB_MAX 8
#else
#define WIDE 0
#define PB_MAX 4
#endif

/* ---- lanes over r ------------------------------------------------------------------------------------------- */
INL void FN(direct_core)(const int PB, const int64_t Q, const float *w, const float *xr, const float *xi, float *yr,
                         float *yi, int64_t R, const int n) {
    vf ar[8], ai[8];
#pragma GCC unroll 8
    for (int j = 0; j < PB; j++) ar[j] = ai[j] = (vf){0};
#pragma GCC unroll 8
    for (int64_t q = 0; q < Q; q++) {
        vf a = FN(get)(xr + q * R, n), b = FN(get)(xi + q * R, n);
#pragma GCC unroll 8
        for (int j = 0; j < PB; j++) {
            float wr = w[2 * (j * Q + q)], wi = w[2 * (j * Q + q) + 1];
            ar[j] += wr * a;
            ai[j] += wr * b;
            ar[j] -= wi * b;
            ai[j] += wi * a;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < PB; j++) {
        FN(put)(yr + j * R, ar[j], n);
        FN(put)(yi + j * R, ai[j], n);
    }
}

INL void FN(direct_span)(const int PB, const int64_t Q, const float *w, const float *xr, const float *xi, float *yr,
                         float *yi, int64_t R) {
    int64_t r = 0;
    for (; r + VL <= R; r += VL) FN(direct_core)(PB, Q, w, xr + r, xi + r, yr + r, yi + r, R, VL);
    if (r < R) FN(direct_core)(PB, Q, w, xr + r, xi + r, yr + r, yi + r, R, (int)(R - r));
}

/* P*Q known: the small squares that merged 2x2 factors become. */
#define FIXED(S)                                                                                                    \
    KFN void FN(direct_##S)(const float *w, int64_t L, int64_t R, const float *xr, const float *xi, float *yr,     \
                            float *yi) {                                                                            \
        for (int64_t l = 0; l < L; l++, xr += S * R, xi += S * R, yr += S * R, yi += S * R)                         \
            for (int p = 0; p < S; p += (S < PB_MAX ? S : PB_MAX))                                                  \
                FN(direct_span)((S < PB_MAX ? S : PB_MAX), S, w + 2 * p * S, xr, xi, yr + p * R, yi + p * R, R);    \
    }
FIXED(2)
FIXED(4)
FIXED(8)
#undef FIXED

KFN void FN(direct)(int64_t P, int64_t Q, const float *w, int64_t L, int64_t R, const float *xr, const float *xi,
                    float *yr, float *yi) {
    if (P == Q && P == 2) {
        FN(direct_2)(w, L, R, xr, xi, yr, yi);
        return;
    }
    if (P == Q && P == 4) {
        FN(direct_4)(w, L, R, xr, xi, yr, yi);
        return;
    }
    if (P == Q && P == 8) {
        FN(direct_8)(w, L, R, xr, xi, yr, yi);
        return;
    }
    int64_t blocks = ceil_div(P, PB_MAX);
    for (int64_t l = 0; l < L; l++, xr += Q * R, xi += Q * R, yr += P * R, yi += P * R)
        for (int64_t k = 0; k < blocks; k++) {
            int64_t p = k * P / blocks, pb = (k + 1) * P / blocks - p;
            const float *wp = w + 2 * p * Q;
            float *r = yr + p * R, *i = yi + p * R;
            switch (pb) {
            case 1: FN(direct_span)(1, Q, wp, xr, xi, r, i, R); break;
            case 2: FN(direct_span)(2, Q, wp, xr, xi, r, i, R); break;
            case 3: FN(direct_span)(3, Q, wp, xr, xi, r, i, R); break;
            case 4: FN(direct_span)(4, Q, wp, xr, xi, r, i, R); break;
#if WIDE
            case 5: FN(direct_span)(5, Q, wp, xr, xi, r, i, R); break;
            case 6: FN(direct_span)(6, Q, wp, xr, xi, r, i, R); break;
            case 7: FN(direct_span)(7, Q, wp, xr, xi, r, i, R); break;
            case 8: FN(direct_span)(8, Q, wp, xr, xi, r, i, R); break;
#endif
            }
        }
}

/* acc[p,q,2,VL] += dy[l,p,r] conj(x[l,q,r]), summed over l and r but not over lanes. */
INL void FN(outer_core)(const int PB, const int QB, int64_t P, int64_t Q, int64_t L, int64_t R, int64_t r0, int64_t r1,
                        const float *gr, const float *gi, const float *xr, const float *xi, float *acc) {
    vf sr[4][4], si[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < PB; i++)
#pragma GCC unroll 4
        for (int j = 0; j < QB; j++) {
            sr[i][j] = FN(load)(acc + (i * Q + j) * 2 * VL);
            si[i][j] = FN(load)(acc + (i * Q + j) * 2 * VL + VL);
        }
#define OUTER_BODY(n)                                                                                               \
    {                                                                                                               \
        vf a[4], b[4];                                                                                              \
        _Pragma("GCC unroll 4") for (int i = 0; i < PB; i++) {                                                      \
            a[i] = FN(get)(gr + l * P * R + i * R + r, n);                                                          \
            b[i] = FN(get)(gi + l * P * R + i * R + r, n);                                                          \
        }                                                                                                           \
        _Pragma("GCC unroll 4") for (int j = 0; j < QB; j++) {                                                      \
            vf c = FN(get)(xr + l * Q * R + j * R + r, n), d = FN(get)(xi + l * Q * R + j * R + r, n);              \
            _Pragma("GCC unroll 4") for (int i = 0; i < PB; i++) {                                                  \
                sr[i][j] += a[i] * c;                                                                               \
                si[i][j] += b[i] * c;                                                                               \
                sr[i][j] += b[i] * d;                                                                               \
                si[i][j] -= a[i] * d;                                                                               \
            }                                                                                                       \
        }                                                                                                           \
    }
    for (int64_t l = 0; l < L; l++) {
        int64_t r = r0;
        for (; r + VL <= r1; r += VL) OUTER_BODY(VL)
        if (r < r1) OUTER_BODY((int)(r1 - r))
    }
#undef OUTER_BODY
#pragma GCC unroll 4
    for (int i = 0; i < PB; i++)
#pragma GCC unroll 4
        for (int j = 0; j < QB; j++) {
            FN(store)(acc + (i * Q + j) * 2 * VL, sr[i][j]);
            FN(store)(acc + (i * Q + j) * 2 * VL + VL, si[i][j]);
        }
}

#define OUTER_PB (WIDE ? 4 : 2)
#define OUTER_QB 2
KFN void FN(outer)(int64_t P, int64_t Q, int64_t L, int64_t R, const float *gr, const float *gi, const float *xr,
                   const float *xi, float *acc) {
    /* Tiles of about 2,048 complex entries, so that what several register blocks read again is in the first cache. */
    int64_t most = P > Q ? P : Q, rc = round_up(2048 / most > VL ? 2048 / most : VL, VL), lc = 2048 / (most * R);
    if (lc < 1) lc = 1;
    for (int64_t l = 0; l < L; l += lc) {
        int64_t nl = l + lc < L ? lc : L - l;
        for (int64_t r0 = 0; r0 < R; r0 += rc) {
            int64_t r1 = r0 + rc < R ? r0 + rc : R;
            for (int64_t p = 0; p < P; p += OUTER_PB)
                for (int64_t q = 0; q < Q; q += OUTER_QB) {
                    int64_t pb = P - p < OUTER_PB ? P - p : OUTER_PB, qb = Q - q < OUTER_QB ? Q - q : OUTER_QB;
                    const float *a = gr + (l * P + p) * R, *b = gi + (l * P + p) * R;
                    const float *c = xr + (l * Q + q) * R, *d = xi + (l * Q + q) * R;
                    float *s = acc + (p * Q + q) * 2 * VL;
#define OUTER_CASE(I, J)                                                                                            \
    case I * 8 + J: FN(outer_core)(I, J, P, Q, nl, R, r0, r1, a, b, c, d, s); break;
                    switch (pb * 8 + qb) {
                        OUTER_CASE(1, 1)
                        OUTER_CASE(2, 1)
                        OUTER_CASE(1, 2)
                        OUTER_CASE(2, 2)
#if WIDE
                        OUTER_CASE(3, 1)
                        OUTER_CASE(4, 1)
                        OUTER_CASE(3, 2)
                        OUTER_CASE(4, 2)
#endif
                    }
                }
        }
    }
}

/* ---- lanes over p ------------------------------------------------------------------------------------------- */
/* MB rows of y = W x, PV vectors of p: w is (Q,2,Pp), row k of x starts at x[k*xm] with step xs over q. */
INL void FN(rows_core)(const int MB, const int PV, int64_t Q, const float *w, int64_t Pp, const float *xr,
                       const float *xi, int64_t xm, int64_t xs, float *yr, float *yi, int64_t ym, const int n) {
    vf ar[8][2], ai[8][2];
#pragma GCC unroll 8
    for (int k = 0; k < MB; k++)
#pragma GCC unroll 2
        for (int v = 0; v < PV; v++) ar[k][v] = ai[k][v] = (vf){0};
    for (int64_t q = 0; q < Q; q++, w += 2 * Pp) {
        vf c[2], d[2];
#pragma GCC unroll 2
        for (int v = 0; v < PV; v++) {
            c[v] = FN(load)(w + v * VL);
            d[v] = FN(load)(w + Pp + v * VL);
        }
#pragma GCC unroll 8
        for (int k = 0; k < MB; k++) {
            float a = xr[k * xm + q * xs], b = xi[k * xm + q * xs];
#pragma GCC unroll 2
            for (int v = 0; v < PV; v++) {
                ar[k][v] += a * c[v];
                ai[k][v] += a * d[v];
                ar[k][v] -= b * d[v];
                ai[k][v] += b * c[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < MB; k++)
#pragma GCC unroll 2
        for (int v = 0; v < PV; v++) {
            int m = v == PV - 1 ? n : VL;
            FN(put)(yr + k * ym + v * VL, ar[k][v], m);
            FN(put)(yi + k * ym + v * VL, ai[k][v], m);
        }
}

#define ROWS_MB (WIDE ? 8 : 4)
/* M rows, all of p; y rows have step ym and are written only up to P. */
KFN void FN(rows_block)(int64_t M, int64_t P, int64_t Q, const float *w, const float *xr, const float *xi, int64_t xm,
                        int64_t xs, float *yr, float *yi, int64_t ym) {
    int64_t Pp = round_up(P, VL), p = 0;
    while (p < P) {
        int pv = P - p > VL ? 2 : 1;
        int n = (int)(P - p - (pv - 1) * VL < VL ? P - p - (pv - 1) * VL : VL);
        int64_t step = pv == 2 ? ROWS_MB / 2 : ROWS_MB;
        for (int64_t m = 0; m < M; m += step) {
            int64_t mb = M - m < step ? M - m : step;
            const float *a = xr + m * xm, *b = xi + m * xm;
            float *c = yr + m * ym + p, *d = yi + m * ym + p;
#define ROWS_CASE(K, V)                                                                                             \
    case K * 4 + V:                                                                                                 \
        if (n == VL)                                                                                                \
            FN(rows_core)(K, V, Q, w + p, Pp, a, b, xm, xs, c, d, ym, VL);                                          \
        else                                                                                                        \
            FN(rows_core)(K, V, Q, w + p, Pp, a, b, xm, xs, c, d, ym, n);                                           \
        break;
            switch (mb * 4 + pv) {
                ROWS_CASE(1, 1)
                ROWS_CASE(2, 1)
                ROWS_CASE(3, 1)
                ROWS_CASE(4, 1)
                ROWS_CASE(1, 2)
                ROWS_CASE(2, 2)
#if WIDE
                ROWS_CASE(5, 1)
                ROWS_CASE(6, 1)
                ROWS_CASE(7, 1)
                ROWS_CASE(8, 1)
                ROWS_CASE(3, 2)
                ROWS_CASE(4, 2)
#endif
            }
        }
        p += pv * VL;
    }
}

KFN void FN(rows)(int64_t P, int64_t Q, const float *w, int64_t L, int64_t R, const float *xr, const float *xi,
                  float *yr, float *yi, float *tmp) {
    if (R == 1) {
        FN(rows_block)(L, P, Q, w, xr, xi, Q, 1, yr, yi, P);
        return;
    }
    int64_t Pp = round_up(P, VL);
    float *tr = tmp, *ti = tmp + ROWS_MB * Pp;
    for (int64_t l = 0; l < L; l++)
        for (int64_t r = 0; r < R; r += ROWS_MB) {
            int64_t mb = R - r < ROWS_MB ? R - r : ROWS_MB;
            FN(rows_block)(mb, P, Q, w, xr + l * Q * R + r, xi + l * Q * R + r, 1, R, tr, ti, Pp);
            for (int64_t p = 0; p < P; p++)
                for (int64_t k = 0; k < mb; k++) {
                    yr[(l * P + p) * R + r + k] = tr[k * Pp + p];
                    yi[(l * P + p) * R + r + k] = ti[k * Pp + p];
                }
        }
}

/* acc(Q,2,Pp) += dy[m,p] conj(x[m,q]) over the rows m. */
INL void FN(rows_outer_core)(const int QB, int64_t M, int64_t Pp, const float *gr, const float *gi, int64_t gm,
                             const float *xr, const float *xi, int64_t xm, int64_t xs, float *acc, const int n) {
    vf sr[8], si[8];
#pragma GCC unroll 8
    for (int j = 0; j < QB; j++) {
        sr[j] = FN(load)(acc + 2 * j * Pp);
        si[j] = FN(load)(acc + 2 * j * Pp + Pp);
    }
    for (int64_t m = 0; m < M; m++) {
        vf a = FN(get)(gr + m * gm, n), b = FN(get)(gi + m * gm, n);
#pragma GCC unroll 8
        for (int j = 0; j < QB; j++) {
            float c = xr[m * xm + j * xs], d = xi[m * xm + j * xs];
            sr[j] += a * c;
            si[j] += b * c;
            sr[j] += b * d;
            si[j] -= a * d;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < QB; j++) {
        FN(store)(acc + 2 * j * Pp, sr[j]);
        FN(store)(acc + 2 * j * Pp + Pp, si[j]);
    }
}

KFN void FN(rows_outer_block)(int64_t M, int64_t P, int64_t Q, const float *gr, const float *gi, int64_t gm,
                              const float *xr, const float *xi, int64_t xm, int64_t xs, float *acc) {
    int64_t Pp = round_up(P, VL), blocks = ceil_div(Q, ROWS_MB);
    for (int64_t p = 0; p < P; p += VL) {
        int n = (int)(P - p < VL ? P - p : VL);
        for (int64_t k = 0; k < blocks; k++) {
            int64_t q = k * Q / blocks, qb = (k + 1) * Q / blocks - q;
            const float *c = xr + q * xs, *d = xi + q * xs;
            float *s = acc + 2 * q * Pp + p;
#define ROUTER_CASE(J)                                                                                              \
    case J:                                                                                                         \
        if (n == VL)                                                                                                \
            FN(rows_outer_core)(J, M, Pp, gr + p, gi + p, gm, c, d, xm, xs, s, VL);                                 \
        else                                                                                                        \
            FN(rows_outer_core)(J, M, Pp, gr + p, gi + p, gm, c, d, xm, xs, s, n);                                  \
        break;
            switch (qb) {
                ROUTER_CASE(1)
                ROUTER_CASE(2)
                ROUTER_CASE(3)
                ROUTER_CASE(4)
#if WIDE
                ROUTER_CASE(5)
                ROUTER_CASE(6)
                ROUTER_CASE(7)
                ROUTER_CASE(8)
#endif
            }
        }
    }
}

KFN void FN(rows_outer)(int64_t P, int64_t Q, int64_t L, int64_t R, const float *gr, const float *gi, const float *xr,
                        const float *xi, float *acc, float *tmp) {
    if (R == 1) {
        FN(rows_outer_block)(L, P, Q, gr, gi, P, xr, xi, Q, 1, acc);
        return;
    }
    float *tr = tmp, *ti = tmp + R * P;
    for (int64_t l = 0; l < L; l++) {
        for (int64_t p = 0; p < P; p++)
            for (int64_t r = 0; r < R; r++) {
                tr[r * P + p] = gr[(l * P + p) * R + r];
                ti[r * P + p] = gi[(l * P + p) * R + r];
            }
        FN(rows_outer_block)(R, P, Q, tr, ti, P, xr + l * Q * R, xi + l * Q * R, 1, R, acc);
    }
}
