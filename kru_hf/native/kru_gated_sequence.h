/* The time loop of the gated cells for one vector width; included after kru_gated_kernel.h with the same macros.
 * A group of up to VL samples runs through the whole sequence, one sample a lane. Nothing but h and, for the LSTM, c is
 * kept for the backward, which recomputes the products and the gates. */

#define STATES(a) ((a)->lstm ? 2 : 1)

/* Planes of the workspace, in floats: never a multiple of 4 KiB, at which streams get in each other's way. */
INL int64_t FN(plane)(const gated_plan *plan) { return round_up(plan->N * VL, 1024) + 16 * 5; }
INL int64_t FN(planes)(const gated_plan *plan, int backward) {
    return 2 + 1 + 2 + plan->G + (backward ? 2 + plan->G * (plan->S - 1) : 0);
}

/* Lanes that a mask holds at step t: all bits set. `held` is false where no sample is held. */
INL vi FN(hold)(const gated_args *a, int64_t b0, int n, int64_t t, int *held) {
    vi hold = {0};
    *held = 0;
    for (int s = 0; a->mask && s < n; s++)
        if (!a->mask[(b0 + s) * a->T + t]) hold[s] = -1, *held = 1;
    return hold;
}

/* Plane k of a (B,S,N) state to a plane of the workspace, zeros if from is NULL, and back. */
KFN void FN(read_state)(const gated_plan *plan, const float *from, int64_t stride, int n, float *to) {
    int64_t N = plan->N;
    if (!from) {
        memset(to, 0, sizeof(float) * N * VL);
        return;
    }
    for (int64_t i = 0; i < N; i += VL) {
        int m = N - i < VL ? (int)(N - i) : VL;
        vf tile[VL];
        FN(gather)(from + i, stride, n, m, tile);
        memcpy(to + i * VL, tile, sizeof(float) * m * VL);
    }
}
KFN void FN(write_state)(const gated_plan *plan, const float *from, float *to, int64_t stride, int n) {
    int64_t N = plan->N;
    for (int64_t i = 0; i < N; i += VL) {
        int m = N - i < VL ? (int)(N - i) : VL;
        vf tile[VL];
        memset(tile, 0, sizeof tile);
        memcpy(tile, from + i * VL, sizeof(float) * m * VL);
        FN(scatter)(tile, to + i, stride, n, m);
    }
}

/* W h for every gate: the products go to `a`. Stage s reads in[s] of the gate; `kept` planes apart, or 0 to overwrite. */
KFN void FN(gated_product)(const gated_plan *plan, const float *w, const float *h, float *inner, int64_t kept, float *a,
                           gated_fetches *fetches) {
    int64_t plane = FN(plane)(plan);
    int S = plan->S;
    for (int64_t g = 0; g < plan->G; g++) {
        const float *x = h;
        for (int s = 0; s < S; s++) {
            const gated_stage *st = &plan->stage[s];
            float *y = s == S - 1 ? a + g * plane : inner + (kept ? g * kept + s * plane : (s & 1) * plane);
            FN(stage)(st, w + st->w + g * st->gate, x, y, fetches);
            x = y;
        }
    }
}

/* An infinite product is NaN: which of the two it is depends on the order in which W is applied. */
INL vf FN(finite)(const float *product) {
    vf v = FN(load)(product);
    return v + 0.0f * v;
}

/* The gates of m units from i on into in[]: i f g o of the LSTM; r z n of the GRU, and W_n h + b'_n into in[3]; f i g of
 * JANET, whose input gate is sigmoid(1 - a_f). */
KFN void FN(gates)(const gated_plan *plan, const gated_args *args, const float *u, int64_t i, int n, int m,
                   const float *a, vf in[4][VL]) {
    int64_t N = plan->N, G = plan->G, plane = FN(plane)(plan);
    const float *b = args->bias + i;
    a += i * VL;
    int own = args->lstm ? 4 : 2, janet = G == 2;
    for (int g = 0; g < G; g++) FN(gather)(u + g * N + i, args->T * G * N, n, m, in[g << janet]);
    for (int g = 0; g < own; g++)
        for (int k = 0; k < m; k++) in[g << janet][k] += FN(finite)(a + g * plane + k * VL) + b[g * N + k];
    if (janet)
        for (int k = 0; k < VL; k++) in[1][k] = 1.0f - in[0][k];
    FN(sigmoid)(m, in[0]);
    FN(sigmoid)(m, in[1]);
    if (args->lstm)
        FN(sigmoid)(m, in[3]);
    else if (!janet)
        for (int k = 0; k < m; k++) {
            in[3][k] = FN(finite)(a + 2 * plane + k * VL) + b[3 * N + k];
            in[2][k] += b[2 * N + k] + in[0][k] * in[3][k];
        }
    FN(tanh)(m, in[2]);
}

KFN void FN(gated_forward)(const gated_plan *plan, const gated_args *args, int64_t b0, int n, float *ws) {
    int64_t N = plan->N, T = args->T, G = plan->G, S = STATES(args), plane = FN(plane)(plan);
    float *h = ws, *c = ws + plane, *a = ws + 3 * plane, *inner = a + G * plane;
    const float *start = args->initial_state ? args->initial_state + b0 * S * N : NULL;
    FN(read_state)(plan, start, S * N, n, h);
    if (args->lstm) FN(read_state)(plan, start ? start + N : NULL, S * N, n, c);
    for (int64_t t = 0; t < T && !stopped(args->progress); t++) {
        const float *u = args->inputs + (b0 * T + t) * G * N;
        float *cells = args->cells ? args->cells + b0 * T * N + t * N * n : NULL;
        int held;
        vi hold = FN(hold)(args, b0, n, t, &held);
        gated_fetches fetches = {{{u, T * G * N, n, G * N, 0},
                                  {args->states + (b0 * T + t) * N, T * N, n, N, 1},
                                  {cells, 0, 1, N * n, 1}}};
        FN(fetch_plan)(plan, &fetches);
        FN(gated_product)(plan, args->packed, h, inner, 0, a, &fetches);
        for (int64_t i = 0; i < N; i += VL) {
            int m = N - i < VL ? (int)(N - i) : VL;
            float *hp = h + i * VL, *cp = c + i * VL;
            vf in[4][VL], out[VL] = {{0}};
            FN(gates)(plan, args, u, i, n, m, a, in);
            if (args->lstm) {
                for (int k = 0; k < m; k++) {
                    vf was = FN(load)(cp + k * VL), now = in[1][k] * was + in[0][k] * in[2][k];
                    out[k] = now;
                    if (held) now = FN(pick)(hold, was, now);
                    FN(store)(cp + k * VL, now);
                    if (cells) FN(put)(cells + (i + k) * n, now, n);
                }
                FN(tanh)(m, out);
                for (int k = 0; k < m; k++) out[k] *= in[3][k];
            } else if (G == 2)
                for (int k = 0; k < m; k++) out[k] = in[0][k] * FN(load)(hp + k * VL) + in[1][k] * in[2][k];
            else
                for (int k = 0; k < m; k++) out[k] = in[2][k] + in[1][k] * (FN(load)(hp + k * VL) - in[2][k]);
            for (int k = 0; k < m; k++) {
                if (held) out[k] = FN(pick)(hold, FN(load)(hp + k * VL), out[k]);
                FN(store)(hp + k * VL, out[k]);
            }
            FN(scatter)(out, args->states + (b0 * T + t) * N + i, T * N, n, m);
        }
    }
    FN(write_state)(plan, h, args->final_state + b0 * S * N, S * N, n);
    if (args->lstm) FN(write_state)(plan, c, args->final_state + b0 * S * N + N, S * N, n);
}

/* Gradients of the m units' pre-activations: into d[] as the inputs have them, d[3] of the GRU that of W_n h + b'_n.
 * g: of h_t. dc: of c_t, then of c_{t-1}; was: c_{t-1}; h: h_{t-1}. What reaches h_{t-1} beside the products goes to g. */
KFN void FN(lstm_back)(int m, vf in[4][VL], vf *g, float *dc, const vf *was, int held, vi hold) {
    vf tc[VL] = {{0}}, none = {0};
    for (int k = 0; k < m; k++) tc[k] = in[1][k] * was[k] + in[0][k] * in[2][k];
    FN(tanh)(m, tc);
    for (int k = 0; k < m; k++) {
        vf si = in[0][k], sf = in[1][k], tg = in[2][k], so = in[3][k], old = FN(load)(dc + k * VL);
        vf go = g[k] * so, total = old + go * (1.0f - tc[k] * tc[k]), gi = total * si, back = total * sf;
        vf d[4] = {gi * tg * (1.0f - si), back * was[k] * (1.0f - sf), gi * (1.0f - tg * tg), go * tc[k] * (1.0f - so)};
        if (held) { /* selected, not multiplied: what is not a number must not leak out of a held step */
            back = FN(pick)(hold, old, back);
            for (int j = 0; j < 4; j++) d[j] = FN(pick)(hold, none, d[j]);
        }
        FN(store)(dc + k * VL, back);
        for (int j = 0; j < 4; j++) in[j][k] = d[j];
        g[k] = held ? FN(pick)(hold, g[k], none) : none;
    }
}
KFN void FN(gru_back)(int m, vf in[4][VL], vf *g, const float *h, int held, vi hold) {
    for (int k = 0; k < m; k++) {
        vf r = in[0][k], z = in[1][k], q = in[2][k], none = {0}, back = g[k] * z;
        vf dq = (g[k] - back) * (1.0f - q * q), dp = dq * r; /* of the candidate's pre-activation, of its product */
        vf d[4] = {dp * in[3][k] * (1.0f - r), back * (FN(load)(h + k * VL) - q) * (1.0f - z), dq, dp};
        if (held) {
            back = FN(pick)(hold, g[k], back);
            for (int j = 0; j < 4; j++) d[j] = FN(pick)(hold, none, d[j]);
        }
        for (int j = 0; j < 4; j++) in[j][k] = d[j];
        g[k] = back;
    }
}
KFN void FN(janet_back)(int m, vf in[4][VL], vf *g, const float *h, int held, vi hold) {
    for (int k = 0; k < m; k++) {
        vf f = in[0][k], i = in[1][k], q = in[2][k], none = {0}, back = g[k] * f, gi = g[k] * i;
        vf d[2] = {back * FN(load)(h + k * VL) * (1.0f - f) - gi * q * (1.0f - i), gi * (1.0f - q * q)};
        if (held) {
            back = FN(pick)(hold, g[k], back);
            for (int j = 0; j < 2; j++) d[j] = FN(pick)(hold, none, d[j]);
        }
        for (int j = 0; j < 2; j++) in[j][k] = d[j];
        g[k] = back;
    }
}

KFN void FN(gated_backward)(const gated_plan *plan, const gated_args *args, int64_t b0, int n, float *ws, float *acc,
                            float *db) {
    int64_t N = plan->N, T = args->T, G = plan->G, S = STATES(args), plane = FN(plane)(plan);
    int64_t kept = (plan->S - 1) * plane;
    float *dh = ws, *dc = ws + plane, *h = ws + 2 * plane, *a = ws + 3 * plane;
    float *tmp = a + G * plane, *c0 = tmp + 2 * plane, *passed = tmp + 3 * plane, *inner = tmp + 4 * plane;
    const float *start = args->initial_state ? args->initial_state + b0 * S * N : NULL;
    const float *end = args->d_final ? args->d_final + b0 * S * N : NULL;
    FN(read_state)(plan, end, S * N, n, dh);
    if (args->lstm) {
        FN(read_state)(plan, end ? end + N : NULL, S * N, n, dc);
        FN(read_state)(plan, start ? start + N : NULL, S * N, n, c0);
    }
    for (int64_t t = T - 1; t >= 0 && !stopped(args->progress); t--) {
        int64_t row = b0 * T + t;
        const float *u = args->inputs + row * G * N, *d_out = args->d_states ? args->d_states + row * N : NULL;
        const float *cells = args->lstm && t ? args->cells + b0 * T * N + (t - 1) * N * n : NULL;
        float *d_in = args->d_inputs + row * G * N;
        int held;
        vi hold = FN(hold)(args, b0, n, t, &held);
        for (int s = n; s < VL; s++) hold[s] = -1, held = 1; /* no sample: 0 times a NaN must not be summed */
        if (t)
            FN(read_state)(plan, args->states + (row - 1) * N, T * N, n, h);
        else
            FN(read_state)(plan, start, S * N, n, h);
        for (int64_t k = 0; held && k < N * VL; k += VL) /* 0 times a NaN would spoil the weights' gradient */
            FN(store)(h + k, FN(pick)(hold, (vf){0}, FN(load)(h + k)));
        gated_fetches fetches = {{{d_out, T * N, n, N, 0},
                                  {cells, 0, 1, N * n, 0},
                                  {t == T - 1 ? u : NULL, T * G * N, n, G * N, 0},
                                  {d_in, T * G * N, n, G * N, 1}}};
        FN(fetch_plan)(plan, &fetches);
        FN(gated_product)(plan, args->packed, h, inner, kept ? kept : 1, a, &fetches);
        for (int64_t i = 0; i < N; i += VL) {
            int m = N - i < VL ? (int)(N - i) : VL;
            vf in[4][VL], g[VL] = {{0}}, was[VL], total[4] = {{0}};
            FN(gates)(plan, args, u, i, n, m, a, in);
            if (d_out) FN(gather)(d_out + i, T * N, n, m, g);
            for (int k = 0; k < m; k++) g[k] += FN(load)(dh + (i + k) * VL);
            if (args->lstm) {
                for (int k = 0; k < m; k++)
                    was[k] = cells ? FN(get)(cells + (i + k) * n, n) : FN(load)(c0 + (i + k) * VL);
                FN(lstm_back)(m, in, g, dc + i * VL, was, held, hold);
            } else if (G == 2)
                FN(janet_back)(m, in, g, h + i * VL, held, hold);
            else
                FN(gru_back)(m, in, g, h + i * VL, held, hold);
            for (int k = 0; k < m; k++) FN(store)(dh + (i + k) * VL, g[k]); /* the products are added to it below */
            for (int j = 0; j < G; j++) {
                const vf *d = in[args->lstm || j < 2 ? j : 3];
                memcpy(a + j * plane + i * VL, d, sizeof(vf) * m);
                total[j] = FN(scatter)(in[j], d_in + j * N + i, T * G * N, n, m);
            }
            if (G == 3) total[3] = FN(scatter)(in[3], NULL, 0, n, m);
            for (int j = 0; j < gated_bias_rows(plan); j++)
                FN(put)(db + j * N + i, FN(get)(db + j * N + i, m) + total[j], m);
        }
        if (held) memcpy(passed, dh, sizeof(float) * N * VL);
        gated_fetches next = {{{t > 1 ? args->states + (row - 2) * N : NULL, T * N, n, N, 0},
                               {t ? u - G * N : NULL, T * G * N, n, G * N, 0}}};
        FN(fetch_plan)(plan, &next);
        for (int64_t g = 0; g < G; g++) {
            const float *from = a + g * plane;
            for (int s = plan->S - 1; s >= 0; s--) {
                const gated_stage *st = &plan->stage[s];
                const float *x = s ? inner + g * kept + (s - 1) * plane : h;
                float *to = s ? tmp + (s & 1) * plane : dh;
                FN(stage_back)(st, args->packed + st->wt + g * st->gate, x, from, to, s == 0,
                               acc + st->acc + g * st->acc_gate, &next);
                from = to;
            }
        }
        for (int64_t k = 0; held && k < N * VL; k += VL) /* without the products, of 0 and what may be NaN */
            FN(store)(dh + k, FN(pick)(hold, FN(load)(passed + k), FN(load)(dh + k)));
    }
    FN(write_state)(plan, dh, args->d_initial + b0 * S * N, S * N, n);
    if (args->lstm) FN(write_state)(plan, dc, args->d_initial + b0 * S * N + N, S * N, n);
}

/* Accumulators to the dense (G,P,Q) gradient of each stage. */
KFN void FN(gated_collect)(const gated_plan *plan, const float *acc, float *dense) {
    for (int s = 0; s < plan->S; s++) {
        const gated_stage *st = &plan->stage[s];
        int64_t P = st->P, Q = st->Q, Qp = round_up(Q, VL);
        for (int64_t g = 0; g < plan->G; g++)
            for (int64_t p = 0; p < P; p++)
                for (int64_t q = 0; q < Q; q++) {
                    const float *from = acc + st->acc + g * st->acc_gate;
                    float sum = 0;
                    if (st->large)
                        sum = from[p * Qp + q];
                    else
                        for (int v = 0; v < VL; v++) sum += from[(p * Q + q) * VL + v];
                    dense[st->dense + (g * P + p) * Q + q] = sum;
                }
    }
}

/* Takes chunks of the groups until none is left. A chunk's result does not depend on who computed it. */
KFN int FN(gated_run)(const gated_plan *plan, const gated_args *a, int backward) {
    float *ws = NULL;
    int64_t acc_at = round_up(FN(planes)(plan, backward) * FN(plane)(plan), 16);
    int64_t floats = acc_at + (backward ? plan->acc_floats : 0), groups = ceil_div(a->B, VL);
    int64_t rows = gated_bias_rows(plan) * plan->N, stride = plan->dense_floats + rows;
    if (posix_memalign((void **)&ws, 64, sizeof(float) * floats)) return -1;
    for (;;) {
        int64_t c = next_chunk(a->progress, a->chunks);
        if (c >= a->chunks) break;
        float *dense = backward ? a->chunk_grads + c * stride : NULL, *db = backward ? dense + plan->dense_floats : NULL;
        if (backward) {
            memset(ws + acc_at, 0, sizeof(float) * plan->acc_floats);
            memset(db, 0, sizeof(float) * rows);
        }
        for (int64_t k = c * groups / a->chunks; k < (c + 1) * groups / a->chunks; k++) {
            int64_t b = k * a->B / groups, n = (k + 1) * a->B / groups - b;
            if (backward)
                FN(gated_backward)(plan, a, b, (int)n, ws, ws + acc_at, db);
            else
                FN(gated_forward)(plan, a, b, (int)n, ws);
        }
        if (backward) FN(gated_collect)(plan, ws + acc_at, dense);
    }
    free(ws);
    return 0;
}
