/* What the library exports for the gated cells; included by kru_scan.c, which has the kernels of every vector width. */
#define KRU_GATED_ABI 3

KRU_EXPORT int64_t kru_gated_abi(void) { return KRU_GATED_ABI; }

/* G gates: 4 for the LSTM, 3 for the GRU, 2 for JANET. Freed by kru_plan_free. NULL: out of memory or too many factors. */
KRU_EXPORT void *kru_gated_plan_new(int64_t G, int64_t F, const int64_t *P, const int64_t *Q, int64_t lanes) {
    if (lanes > best_lanes() || (lanes != 4 && lanes != 8 && lanes != 16)) return NULL;
    return gated_plan_new(G, (int)F, P, Q, lanes);
}
KRU_EXPORT int64_t kru_gated_plan_packed_floats(const gated_plan *plan) { return plan->packed_floats; }
KRU_EXPORT int64_t kru_gated_plan_dense_floats(const gated_plan *plan) { return plan->dense_floats; }
KRU_EXPORT double kru_gated_plan_work(const gated_plan *plan) { return plan->work; }

/* Merges the factors (G,P_f,Q_f) of each stage and lays the stages out for the kernels. */
KRU_EXPORT int kru_gated_pack(const gated_plan *plan, const float *const *factors, float *packed) {
    float *dense = malloc(sizeof(float) * (plan->dense_floats + 1));
    if (!dense) return -1;
    int64_t rows = gated_rows(plan->lanes);
    for (int s = 0; s < plan->S; s++)
        for (int64_t g = 0; g < plan->G; g++) {
            const gated_stage *st = &plan->stage[s];
            gated_dense(plan, st->first, st->last, g, factors, dense);
            gated_pack_rows(st->P, st->Q, st->Q, 1, rows, dense, packed + st->w + g * st->gate);
            gated_pack_rows(st->Q, st->P, 1, st->Q, rows, dense, packed + st->wt + g * st->gate);
        }
    free(dense);
    return 0;
}

static int gated_run(const gated_plan *plan, const gated_args *args, int backward) {
    int status;
    unsigned int mode = flush_subnormals();
#if KRU_X86
    if (plan->lanes == 16)
        status = gated_run_avx512(plan, args, backward);
    else if (plan->lanes == 8)
        status = gated_run_avx2(plan, args, backward);
    else
#endif
        status = gated_run_generic(plan, args, backward);
    restore_mode(mode);
    return status;
}
KRU_EXPORT int kru_gated_forward(const gated_plan *plan, const gated_args *args) { return gated_run(plan, args, 0); }
KRU_EXPORT int kru_gated_backward(const gated_plan *plan, const gated_args *args) { return gated_run(plan, args, 1); }

/* Sums the chunks in order and takes merged gradients back to the factors: d_factors[f] is (G,P_f,Q_f), d_bias (4,N) or
 * (2,N). */
KRU_EXPORT int kru_gated_reduce(const gated_plan *plan, const float *const *factors, int64_t chunks,
                                const float *chunk_grads, float *const *d_factors, float *d_bias) {
    int64_t W = plan->dense_floats, rows = gated_bias_rows(plan) * plan->N, stride = W + rows;
    float *sum = calloc(3 * W + 2, sizeof(float));
    if (!sum) return -1;
    memset(d_bias, 0, sizeof(float) * rows);
    for (int64_t c = 0; c < chunks; c++) {
        const float *from = chunk_grads + c * stride;
        for (int64_t i = 0; i < W; i++) sum[i] += from[i];
        for (int64_t i = 0; i < rows; i++) d_bias[i] += from[W + i];
    }
    for (int s = 0; s < plan->S; s++)
        for (int64_t g = 0; g < plan->G; g++) {
            const gated_stage *st = &plan->stage[s];
            gated_project(plan, st, g, factors, sum + st->dense + g * st->P * st->Q, sum + W, d_factors);
        }
    free(sum);
    return 0;
}
