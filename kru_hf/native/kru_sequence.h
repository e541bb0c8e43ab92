/* The time loop of one vector width, forward and backward; included after kru_kernel.h with the same macros.
 * A group of up to plan->group samples advances in lockstep: in the workspace its samples are one more slow index,
 * two planes of group*N floats, `plane` apart. */

/* 1/|z| of n lanes of z = x + iy. Where |z|^2 leaves the range of normal numbers, z is multiplied by `scale`, a power of
 * two, 1/|z| is that of the product, and sigma(z) = z (one + b/|z|) with one = 1 / scale.
 * An infinite |z| gives NaN, as a NaN does; z = 0 gives one = -infinity, so that it is idle with every finite b. */
INL vf FN(modulus)(vf *x, vf *y, vf *one, vf *scale, int n) {
    vf m = *x * *x + *y * *y;
    *one = *scale = (vf){0} + 1.0f;
    if (FN(within)(m, 0x1p-100f, 0x1p100f, n)) return FN(rsqrt)(m);
    vf down = (vf){0} + 0x1p-96f, up = (vf){0} + 0x1p96f, infinite = (vf){0} + __builtin_inff();
    vi large = (vi)(m > 0x1p100f), small = (vi)(m < 0x1p-100f);
    *one = FN(pick)(large, up, FN(pick)(small, down, *one));
    *scale = FN(pick)(large, down, FN(pick)(small, up, *scale));
    *x *= *scale;
    *y *= *scale;
    m = *x * *x + *y * *y;
    m = FN(pick)(large & (vi)(m >= 0x1p64f), infinite, m);
    vi zero = (vi)(m == 0.0f);
    *one = FN(pick)(zero, -infinite, *one);
    m = FN(pick)(zero, (vf){0} + 1.0f, m);
    return FN(rsqrt)(m) + 0.0f * m;
}

/* modReLU and the mask of one sample's step; h is (2,N) of stride `plane`, z the same, all written in place. */
INL void FN(activate_core)(int64_t i, const int n, int modrelu, const float *bias, const float *zr, const float *zi,
                           const float *ur, const float *ui, float *hr, float *hi, float *or, float *oi) {
    vf a = FN(get)(zr + i, n) + FN(get)(ur + i, n), b = FN(get)(zi + i, n) + FN(get)(ui + i, n);
    if (modrelu) {
        vf one, scale, inv = FN(modulus)(&a, &b, &one, &scale, n), none = {0};
        vf s = one + FN(get)(bias + i, n) * inv;
        vi off = (vi)(s <= 0.0f); /* false for NaN, which stays NaN */
        a = FN(pick)(off, none, a * s);
        b = FN(pick)(off, none, b * s);
    } else { /* an infinity becomes NaN: what W would make of it depends on the order of its products */
        vf nothing = 0.0f * a + 0.0f * b;
        a += nothing;
        b += nothing;
    }
    FN(put)(hr + i, a, n);
    FN(put)(hi + i, b, n);
    FN(put)(or + i, a, n);
    FN(put)(oi + i, b, n);
}

KFN void FN(activate)(int64_t N, int modrelu, const float *bias, const float *zr, const float *zi, const float *u,
                      float *hr, float *hi, float *out) {
    int64_t i = 0;
    for (; i + VL <= N; i += VL) FN(activate_core)(i, VL, modrelu, bias, zr, zi, u, u + N, hr, hi, out, out + N);
    if (i < N) FN(activate_core)(i, (int)(N - i), modrelu, bias, zr, zi, u, u + N, hr, hi, out, out + N);
}

/* g is the gradient of h_t, replaced by the gradient of z_t; db(N) accumulates; dz is written to the output too. */
INL void FN(activate_back_core)(int64_t i, const int n, int modrelu, const float *bias, const float *zr,
                                const float *zi, const float *ur, const float *ui, float *gr, float *gi, float *db,
                                float *or, float *oi) {
    vf a = FN(get)(gr + i, n), b = FN(get)(gi + i, n);
    if (modrelu) {
        vf x = FN(get)(zr + i, n) + FN(get)(ur + i, n), y = FN(get)(zi + i, n) + FN(get)(ui + i, n);
        vf one, scale, inv = FN(modulus)(&x, &y, &one, &scale, n), k = FN(get)(bias + i, n) * inv, none = {0};
        vi off = (vi)(one + k <= 0.0f);
        k *= scale; /* b/|z| */
        x *= inv; /* unit phase */
        y *= inv;
        vf along = a * x + b * y; /* the gradient of |z|, and of the bias */
        a = FN(pick)(off, none, a + k * (a - along * x));
        b = FN(pick)(off, none, b + k * (b - along * y));
        FN(put)(db + i, FN(get)(db + i, n) + FN(pick)(off, none, along), n);
        FN(put)(gr + i, a, n);
        FN(put)(gi + i, b, n);
    }
    FN(put)(or + i, a, n);
    FN(put)(oi + i, b, n);
}

KFN void FN(activate_back)(int64_t N, int modrelu, const float *bias, const float *zr, const float *zi, const float *u,
                           float *gr, float *gi, float *db, float *out) {
    int64_t i = 0;
    for (; i + VL <= N; i += VL)
        FN(activate_back_core)(i, VL, modrelu, bias, zr, zi, u, u + N, gr, gi, db, out, out + N);
    if (i < N) FN(activate_back_core)(i, (int)(N - i), modrelu, bias, zr, zi, u, u + N, gr, gi, db, out, out + N);
}

KFN void FN(add)(int64_t n, float *restrict y, const float *restrict x) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

/* One step's arrays end where a page does, and no hardware prefetcher follows: fetch the next step's while this one
 * computes. p may be NULL. */
KFN void FN(fetch)(const float *p, int64_t floats) {
    if (p)
        for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(p + i, 0, 2);
}
KFN void FN(fetch_for_write)(const float *p, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(p + i, 1, 2);
}

/* One stage on L slices of (Q, right). */
KFN void FN(apply)(const kru_stage *st, const float *w, int64_t L, const float *x, float *y, int64_t plane,
                   float *tmp) {
    if (st->kind == KRU_DIRECT)
        FN(direct)(st->P, st->Q, w + st->w, L, st->right, x, x + plane, y, y + plane);
    else
        FN(rows)(st->P, st->Q, w + st->w, L, st->right, x, x + plane, y, y + plane, tmp);
}

/* g: gradient of the stage's output; dx: gradient of its input x; acc: gradient of its weights. */
KFN void FN(apply_back)(const kru_stage *st, const float *w, int64_t L, const float *x, const float *g, float *dx,
                        int64_t plane, float *acc, float *tmp) {
    int64_t R = st->right;
    if (st->kind == KRU_DIRECT) {
        FN(outer)(st->P, st->Q, L, R, g, g + plane, x, x + plane, acc + st->acc);
        FN(direct)(st->Q, st->P, w + st->wh, L, R, g, g + plane, dx, dx + plane);
    } else {
        FN(rows_outer)(st->P, st->Q, L, R, g, g + plane, x, x + plane, acc + st->acc, tmp);
        FN(rows)(st->Q, st->P, w + st->wh, L, R, g, g + plane, dx, dx + plane, tmp);
    }
}

/* W times the group's states: stage s reads in[s] and writes in[s+1]. Stages after `stages` are left out. */
KFN void FN(product)(const kru_plan *plan, const float *w, int64_t G, float *const *in, int stages, int64_t plane,
                     float *tmp) {
    for (int s = 0; s < stages; s++)
        FN(apply)(&plan->stage[s], w, G * plan->stage[s].left, in[s], in[s + 1], plane, tmp);
}

/* The way back: g (gradient of W h, destroyed) and `other` change places after each stage; returns where dh lies. */
KFN float *FN(product_back)(const kru_plan *plan, const float *w, int64_t G, float *const *in, float *g, float *other,
                            int64_t plane, float *acc, float *tmp) {
    for (int s = plan->S - 1; s >= 0; s--) {
        FN(apply_back)(&plan->stage[s], w, G * plan->stage[s].left, in[s], g, other, plane, acc, tmp);
        float *swap = g;
        g = other;
        other = swap;
    }
    return g;
}

static int64_t FN(workspace)(const kru_plan *plan, int backward) {
    int64_t plane = round_up(plan->group * plan->N, 16) + 16;
    int64_t floats = 2 * plane * (backward ? plan->S + 3 : 3) + round_up(plan->tmp_floats, 16);
    return floats + (backward ? round_up(plan->acc_floats, 16) : 0);
}

KFN void FN(forward_group)(const kru_plan *plan, const kru_args *a, int64_t b0, int64_t G, float *ws) {
    int64_t N = plan->N, T = a->T, plane = round_up(plan->group * N, 16) + 16;
    float *h = ws, *tmp = ws + 6 * plane, *in[KRU_MAX_FACTORS + 1] = {h};
    for (int s = 0; s < plan->S; s++) in[s + 1] = ws + (s & 1 ? 4 : 2) * plane;
    for (int64_t g = 0; g < G; g++)
        for (int c = 0; c < 2; c++) {
            if (a->initial_state)
                memcpy(h + c * plane + g * N, a->initial_state + ((b0 + g) * 2 + c) * N, sizeof(float) * N);
            else
                memset(h + c * plane + g * N, 0, sizeof(float) * N);
        }
    for (int64_t t = 0; t < T && !stopped(a->progress); t++) {
        for (int64_t g = 0; g < G && t + 1 < T; g++) {
            int64_t next = ((b0 + g) * T + t + 1) * 2 * N;
            FN(fetch)(a->inputs + next, 2 * N);
            FN(fetch_for_write)(a->states + next, 2 * N);
        }
        FN(product)(plan, a->packed, G, in, plan->S, plane, tmp);
        const float *x = in[plan->S];
        for (int64_t g = 0; g < G; g++) {
            int64_t at = (b0 + g) * T + t;
            float *out = a->states + at * 2 * N, *hr = h + g * N, *hi = hr + plane;
            if (a->mask && !a->mask[at]) { /* a padded step holds the state */
                memcpy(out, hr, sizeof(float) * N);
                memcpy(out + N, hi, sizeof(float) * N);
            } else
                FN(activate)(N, a->modrelu, a->bias, x + g * N, x + plane + g * N, a->inputs + at * 2 * N, hr, hi, out);
        }
    }
    for (int64_t g = 0; g < G; g++)
        for (int c = 0; c < 2; c++)
            memcpy(a->final_state + ((b0 + g) * 2 + c) * N, h + c * plane + g * N, sizeof(float) * N);
}

KFN void FN(backward_group)(const kru_plan *plan, const kru_args *a, int64_t b0, int64_t G, float *ws, float *acc,
                            float *db) {
    int64_t N = plan->N, T = a->T, plane = round_up(plan->group * N, 16) + 16;
    int S = plan->S;
    float *held = ws, *buf[2] = {ws + 2 * plane, ws + 4 * plane}, *xs = ws + 6 * plane; /* xs: the inputs of S stages */
    float *tmp = xs + S * 2 * plane, *g_h = buf[0], *z = held, *in[KRU_MAX_FACTORS + 1];
    for (int s = 0; s <= S; s++) in[s] = s < S ? xs + s * 2 * plane : z;
    for (int64_t g = 0; g < G; g++)
        for (int c = 0; c < 2; c++) {
            if (a->d_final)
                memcpy(g_h + c * plane + g * N, a->d_final + ((b0 + g) * 2 + c) * N, sizeof(float) * N);
            else
                memset(g_h + c * plane + g * N, 0, sizeof(float) * N);
        }
    for (int64_t t = T - 1; t >= 0 && !stopped(a->progress); t--) {
        for (int64_t g = 0; g < G; g++) { /* h_{t-1} into the first stage's input */
            const float *h = t > 0 ? a->states + ((b0 + g) * T + t - 1) * 2 * N
                             : a->initial_state ? a->initial_state + (b0 + g) * 2 * N : NULL;
            if (a->mask && !a->mask[(b0 + g) * T + t]) h = NULL; /* held: 0 times a NaN would spoil the weights' gradient */
            for (int c = 0; c < 2; c++) {
                if (h)
                    memcpy(xs + c * plane + g * N, h + c * N, sizeof(float) * N);
                else
                    memset(xs + c * plane + g * N, 0, sizeof(float) * N);
            }
        }
        for (int64_t k = 0; k < G && t > 0; k++) {
            int64_t next = ((b0 + k) * T + t - 1) * 2 * N;
            FN(fetch)(a->inputs + next, 2 * N);
            if (t > 1) FN(fetch)(a->states + next - 2 * N, 2 * N);
        }
        FN(product)(plan, a->packed, G, in, a->modrelu ? S : S - 1, plane, tmp); /* a linear network never needs z */
        for (int64_t g = 0; g < G; g++) {
            int64_t at = (b0 + g) * T + t;
            float *gr = g_h + g * N, *gi = gr + plane, *out = a->d_inputs + at * 2 * N;
            if (a->d_states) {
                FN(add)(N, gr, a->d_states + at * 2 * N);
                FN(add)(N, gi, a->d_states + at * 2 * N + N);
            }
            if (a->mask && !a->mask[at]) {
                memset(out, 0, sizeof(float) * 2 * N);
                /* z is not needed any more: it keeps the gradient that passes a held step untouched */
                memcpy(z + g * N, gr, sizeof(float) * N);
                memcpy(z + plane + g * N, gi, sizeof(float) * N);
                memset(gr, 0, sizeof(float) * N);
                memset(gi, 0, sizeof(float) * N);
            } else
                FN(activate_back)(N, a->modrelu, a->bias, z + g * N, z + plane + g * N, a->inputs + at * 2 * N, gr, gi,
                                  db, out);
        }
        float *other = g_h == buf[0] ? buf[1] : buf[0];
        for (int64_t k = 0; k < G && t > 0; k++) {
            int64_t next = ((b0 + k) * T + t - 1) * 2 * N;
            if (a->d_states) FN(fetch)(a->d_states + next, 2 * N);
            FN(fetch_for_write)(a->d_inputs + next, 2 * N);
        }
        g_h = FN(product_back)(plan, a->packed, G, in, g_h, other, plane, acc, tmp);
        if (a->mask)
            for (int64_t k = 0; k < G; k++)
                if (!a->mask[(b0 + k) * T + t]) {
                    memcpy(g_h + k * N, z + k * N, sizeof(float) * N);
                    memcpy(g_h + plane + k * N, z + plane + k * N, sizeof(float) * N);
                }
    }
    if (a->d_initial)
        for (int64_t g = 0; g < G; g++)
            for (int c = 0; c < 2; c++)
                memcpy(a->d_initial + ((b0 + g) * 2 + c) * N, g_h + c * plane + g * N, sizeof(float) * N);
}

/* Accumulators to the dense (P,Q,2) gradient of each stage. */
KFN void FN(collect)(const kru_plan *plan, const float *acc, float *dense) {
    for (int s = 0; s < plan->S; s++) {
        const kru_stage *st = &plan->stage[s];
        int64_t Pp = round_up(st->P, VL);
        const float *from = acc + st->acc;
        for (int64_t p = 0; p < st->P; p++)
            for (int64_t q = 0; q < st->Q; q++)
                for (int c = 0; c < 2; c++) {
                    float sum = 0;
                    if (st->kind == KRU_DIRECT)
                        for (int v = 0; v < VL; v++) sum += from[((p * st->Q + q) * 2 + c) * VL + v];
                    else
                        sum = from[(2 * q + c) * Pp + p];
                    dense[st->dense + 2 * (p * st->Q + q) + c] = sum;
                }
    }
}

/* Takes chunks of the batch until none is left. A chunk's result does not depend on who computed it. */
KFN int FN(run)(const kru_plan *plan, const kru_args *a, int backward) {
    float *ws = NULL;
    int64_t floats = FN(workspace)(plan, backward), stride = plan->dense_floats + plan->N;
    if (posix_memalign((void **)&ws, 64, sizeof(float) * floats)) return -1;
    int64_t acc_at = floats - round_up(plan->acc_floats, 16);
    for (;;) {
        int64_t c = next_chunk(a->progress, a->chunks);
        if (c >= a->chunks) break;
        int64_t b = c * a->B / a->chunks, end = (c + 1) * a->B / a->chunks;
        float *dense = backward ? a->chunk_grads + c * stride : NULL, *db = backward ? dense + plan->dense_floats : NULL;
        if (backward) {
            memset(ws + acc_at, 0, sizeof(float) * plan->acc_floats);
            memset(db, 0, sizeof(float) * plan->N);
        }
        for (int64_t G; b < end; b += G) {
            G = end - b < plan->group ? end - b : plan->group;
            if (backward)
                FN(backward_group)(plan, a, b, G, ws, ws + acc_at, db);
            else
                FN(forward_group)(plan, a, b, G, ws);
        }
        if (backward) FN(collect)(plan, ws + acc_at, dense);
    }
    free(ws);
    return 0;
}
