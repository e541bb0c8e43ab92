/* Native CPU engine of the Kronecker recurrences: whole sequences in one call, forward and backward, of every cell of
 * cells.inc: h_t = cell((sum over terms of W_0 x ... x W_{F-1}) h_{t-1}, inputs_t, bias, state).
 *
 * Called from kru_hf/scan_cpu.py through ctypes: no torch headers, no Python API, no threads of its own (each calling
 * thread takes chunks of the batch from a shared counter). One object holds every vector width; the widest that the
 * processor has is chosen at run time.
 *
 *   plan.h       shapes: stages, their order and layout, weights packed, gradients back to the factors
 *   workspace.h  a thread's memory by name;  fetch.h: what the next step reads, fetched in time
 *   width.inc    all that depends on the vectors' width: vector.inc, then for each of three layouts (units.inc: complex cells,
 *                real ones; samples.inc: real ones) the cells (cells.inc) and the time loop (sequence.inc) */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define KRU_X86 1
#endif

/* 32 vector registers with AVX-512 and NEON, 16 otherwise. */
#if defined(__aarch64__)
#define KRU_WIDE(lanes) 1
#else
#define KRU_WIDE(lanes) ((lanes) == 16)
#endif

#include "fetch.h"
#include "plan.h"
#include "workspace.h"

#define KRU_ABI 6
#define KRU_EXPORT __attribute__((visibility("default")))

/* K planes of the inputs, S of the state, O of the returned states: see kru_facts in cells.inc. */
typedef struct {
    int64_t B, T, chunks;
    const float *packed, *inputs, *bias, *initial_state; /* from kru_pack, (B,T,K,N), (rows,N), (B,S,N) or NULL: zeros */
    const uint8_t *mask;   /* (B,T), 0 holds the state; NULL: none */
    const uint8_t *starts; /* (B,T), 1: the state before the step is zero; NULL: none */
    float *states;         /* (B,T,O,N): written by the forward, read by the backward */
    float *saved;          /* (B,T,S-O,N): the state beside h; NULL in a forward that no backward follows */
    float *final_state;    /* (B,S,N) */
    const float *d_states, *d_final; /* NULL: zero */
    float *d_inputs, *d_initial;
    float *chunk_grads; /* (chunks, dense + rows N): stage gradients, then the bias's */
    int64_t next;       /* the next chunk, shared by the calling threads; starts at 0 */
    int64_t stop;       /* not 0 asks all threads to end at their next time step */
} kru_args;

static int stopped(const kru_args *a) { return __atomic_load_n(&a->stop, __ATOMIC_RELAXED) != 0; }
static int64_t next_chunk(kru_args *a) { return stopped(a) ? a->chunks : __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED); }

/* Whether a flag of n samples at one step is 0, or (`set`) is not. */
static int any_flag(const uint8_t *flags, int64_t T, int n, int set) {
    for (int s = 0; s < n; s++)
        if ((flags[s * T] != 0) == set) return 1;
    return 0;
}

/* Where plane k of the state after step `at` of all B T lies, in states or in saved (NULL: nowhere), for each sample. */
typedef struct {
    float *at;
    int64_t stride;
} kru_rows;
static inline kru_rows state_rows(const kru_args *a, kru_facts facts, int64_t N, int k, int64_t at) {
    int O = facts.outputs, planes = k < O ? O : facts.states - O;
    float *all = k < O ? a->states : a->saved;
    return (kru_rows){all ? all + (at * planes + k % O) * N : NULL, a->T * planes * N};
}

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#if KRU_X86
#define LANES 16
#include "width.inc"
#undef LANES
#define LANES 8
#include "width.inc"
#undef LANES
#endif
#define LANES 4
#include "width.inc"

static int best_lanes(void) {
#if KRU_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

/* One group of samples through the sequence, by the code of the plan's width and layout. */
typedef void group_function(const kru_plan *, const kru_args *, const kru_workspace *, int64_t, int, float *);
static group_function *group_of(const kru_plan *plan) {
#define GROUP(width) \
    plan->c == 2 ? CAT(complex_group_, width) : plan->units ? CAT(real_group_, width) : CAT(samples_group_, width)
#if KRU_X86
    if (plan->lanes == 16) return GROUP(avx512);
    if (plan->lanes == 8) return GROUP(avx2);
#endif
    return GROUP(generic);
}

static int64_t bias_floats(const kru_plan *plan) { return plan->facts.rows * plan->N; }

/* Takes chunks of the batch until none is left. A chunk's result does not depend on who computed it. */
static int run(const kru_plan *plan, kru_args *a, int backward) {
    kru_workspace ws = workspace(plan, backward, NULL);
    group_function *group = group_of(plan);
    int64_t groups = ceil_div(a->B, plan->group), stride = plan->dense_floats + bias_floats(plan);
    float *memory = NULL;
    if (posix_memalign((void **)&memory, 64, sizeof(float) * ws.floats)) return -1;
    ws = workspace(plan, backward, memory);
#if KRU_X86 /* decaying states end in subnormal numbers, which cost a hundred cycles each: flush them, for one call only */
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    for (int64_t c; (c = next_chunk(a)) < a->chunks;) {
        float *dense = backward ? a->chunk_grads + c * stride : NULL, *db = backward ? dense + plan->dense_floats : NULL;
        if (backward) {
            memset(ws.acc, 0, sizeof(float) * plan->acc_floats);
            memset(db, 0, sizeof(float) * bias_floats(plan));
        }
        for (int64_t k = c * groups / a->chunks; k < (c + 1) * groups / a->chunks; k++) {
            int64_t b0 = k * a->B / groups, n = (k + 1) * a->B / groups - b0;
            group(plan, a, &ws, b0, (int)n, db);
        }
        if (backward) collect(plan, ws.acc, dense);
    }
#if KRU_X86
    _mm_setcsr(mode);
#endif
    free(memory);
    return 0;
}

KRU_EXPORT int kru_abi(void) { return KRU_ABI; }

/* Vector lanes of this processor; a plan may ask for fewer, which the tests do. */
KRU_EXPORT int64_t kru_lanes(void) { return best_lanes(); }

/* Names of the cells, each followed by a space; a plan is asked for by the number of the name. */
KRU_EXPORT const char *kru_cells(void) { return COMPLEX_CELLS(AS_NAME) REAL_CELLS(AS_NAME); }

/* Opaque, for as many threads as wanted, freed by kru_plan_free; lanes 0: the processor's. NULL: out of memory, no such cell
 * or width, or too many factors. sizes: floats of the packed weights and of one chunk's gradients, samples of a group, and
 * the estimated vector operations of a group's step. */
KRU_EXPORT void *kru_plan_new(int64_t cell, int64_t gates, int64_t rows, int64_t states, int64_t B, int64_t R, int64_t F,
                              const int64_t *P, const int64_t *Q, int64_t lanes, int64_t *sizes) {
    if (!lanes) lanes = best_lanes();
    int fits = lanes <= best_lanes() && (lanes == 4 || lanes == 8 || lanes == 16);
    kru_plan *plan = fits ? plan_new(cell, gates, rows, states, B, R, F, P, Q, lanes) : NULL;
    if (!plan) return NULL;
    sizes[0] = plan->packed_floats;
    sizes[1] = plan->dense_floats + bias_floats(plan);
    sizes[2] = plan->group;
    sizes[3] = (int64_t)plan->work;
    return plan;
}
KRU_EXPORT void kru_plan_free(void *plan) { free(plan); }

/* Merges the factors (R,K,P_f,Q_f) of each stage and lays the stages out for the kernels. */
KRU_EXPORT int kru_pack(const kru_plan *plan, const float *const *factors, float *packed) {
    float *dense = malloc(sizeof(float) * (plan->dense_floats + 2));
    if (!dense) return -1;
    for (int s = 0; s < plan->S; s++)
        for (int64_t m = 0; m < plan->R * plan->M; m++) {
            const kru_stage *st = &plan->stage[s];
            merge(plan, st->first, st->last, m, factors, dense);
            pack(plan, st, dense, packed + st->w + m * st->step, packed + st->adjoint + m * st->step);
        }
    free(dense);
    return 0;
}

/* 0, or -1: no memory for the workspace. */
KRU_EXPORT int kru_forward(const kru_plan *plan, kru_args *args) { return run(plan, args, 0); }
KRU_EXPORT int kru_backward(const kru_plan *plan, kru_args *args) { return run(plan, args, 1); }

/* Takes the stages' gradients, a chunk's or the sum of all chunks', back to the factors: d_factors[f] is (R,K,P_f,Q_f). */
KRU_EXPORT int kru_project(const kru_plan *plan, const float *const *factors, const float *grads, float *const *d_factors) {
    float *scratch = malloc(sizeof(float) * (2 * plan->dense_floats + 4));
    if (!scratch) return -1;
    for (int s = 0; s < plan->S; s++)
        for (int64_t m = 0; m < plan->R * plan->M; m++) {
            const kru_stage *st = &plan->stage[s];
            project(plan, st, m, factors, grads + st->dense + m * st->P * st->Q * plan->c, scratch, d_factors);
        }
    free(scratch);
    return 0;
}

/* setuptools' extension build on some platforms demands this symbol; the library is never imported as a module. */
KRU_EXPORT void *PyInit__native(void) { return NULL; }
