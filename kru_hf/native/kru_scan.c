/* Native CPU engine of the Kronecker recurrence: h_t = modReLU((W_0 x ... x W_{F-1}) h_{t-1} + inputs_t, bias),
 * complex numbers as two float planes, whole sequences in one call, forward and backward. kru_gated*.h: the same for an
 * LSTM, a GRU and a JANET whose gates have real factors.
 *
 * Called from kru_hf/scan_cpu.py through ctypes: no torch headers, no Python API, no threads of its own (each calling
 * thread takes chunks of the batch from a shared counter). One object holds every vector width; the widest that
 * the processor has is chosen at run time. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define KRU_X86 1
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kru_gated_plan.h"
#include "kru_plan.h"

#define KRU_ABI 3
#define KRU_EXPORT __attribute__((visibility("default")))

typedef struct {
    int64_t B, T, modrelu, chunks;
    const float *packed, *inputs, *bias, *initial_state;
    const uint8_t *mask; /* (B,T), 0 holds the state; NULL: none */
    float *states;       /* (B,T,2,N): written by the forward, read by the backward */
    float *final_state;  /* (B,2,N) */
    const float *d_states, *d_final; /* NULL: zero */
    float *d_inputs, *d_initial;     /* d_initial NULL: not wanted */
    float *chunk_grads;              /* (chunks, dense + N): stage gradients, then the bias's */
    int64_t *progress;               /* shared by the calling threads: see next_chunk */
} kru_args;

/* The gated cells: inputs (B,T,G,N), one plane of states (B,T,N), states at the ends (B,S,N) with S = 2 for the LSTM. */
typedef struct {
    int64_t B, T, lstm, chunks;
    const float *packed, *inputs, *bias, *initial_state;
    const uint8_t *mask;
    float *states, *final_state;
    float *cells; /* B*T*N floats, (T,N,samples) for each group: c_t; NULL in a forward that no backward follows */
    const float *d_states, *d_final;
    float *d_inputs, *d_initial;
    float *chunk_grads; /* (chunks, dense + 4N), or 2N */
    int64_t *progress;
} gated_args;

/* progress[0]: the next chunk, starts at 0. progress[1]: not 0 asks all threads to end at their next time step. */
static int stopped(const int64_t *progress) { return __atomic_load_n(progress + 1, __ATOMIC_RELAXED) != 0; }
static int64_t next_chunk(int64_t *progress, int64_t chunks) {
    return stopped(progress) ? chunks : __atomic_fetch_add(progress, 1, __ATOMIC_RELAXED);
}

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#if KRU_X86
#define VL 16
#define ISA_AVX512
#define FN(name) CAT(name, _avx512)
#define TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#include "kru_kernel.h"
#include "kru_sequence.h"
#include "kru_gated_kernel.h"
#include "kru_gated_sequence.h"
#include "kru_undef.h"

#define VL 8
#define ISA_AVX2
#define FN(name) CAT(name, _avx2)
#define TARGET __attribute__((target("avx2,fma")))
#include "kru_kernel.h"
#include "kru_sequence.h"
#include "kru_gated_kernel.h"
#include "kru_gated_sequence.h"
#include "kru_undef.h"
#endif

#define VL 4
#define ISA_GENERIC
#define FN(name) CAT(name, _generic)
#define TARGET
#include "kru_kernel.h"
#include "kru_sequence.h"
#include "kru_gated_kernel.h"
#include "kru_gated_sequence.h"
#include "kru_undef.h"

static int best_lanes(void) {
#if KRU_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

KRU_EXPORT int64_t kru_abi(void) { return KRU_ABI; }

/* Vector lanes of this processor; a plan may ask for fewer, which the tests do. */
KRU_EXPORT int64_t kru_lanes(void) { return best_lanes(); }

/* Opaque, for as many threads as wanted, freed by kru_plan_free. NULL: out of memory or too many factors. */
KRU_EXPORT void *kru_plan_new(int64_t F, const int64_t *P, const int64_t *Q, int64_t lanes) {
    if (lanes > best_lanes() || (lanes != 4 && lanes != 8 && lanes != 16)) return NULL;
    return plan_new((int)F, P, Q, lanes);
}
KRU_EXPORT void kru_plan_free(void *plan) { free(plan); }
KRU_EXPORT int64_t kru_plan_packed_floats(const kru_plan *plan) { return plan->packed_floats; }
KRU_EXPORT int64_t kru_plan_dense_floats(const kru_plan *plan) { return plan->dense_floats; }
KRU_EXPORT int64_t kru_plan_group(const kru_plan *plan) { return plan->group; }
KRU_EXPORT double kru_plan_work(const kru_plan *plan) { return plan->work; }

/* Stage s as (P, Q, left, right, kind, number of merged factors); returns the number of stages. */
KRU_EXPORT int64_t kru_plan_stage(const kru_plan *plan, int64_t s, int64_t *out) {
    if (s >= 0 && s < plan->S) {
        const kru_stage *st = &plan->stage[s];
        int64_t values[6] = {st->P, st->Q, st->left, st->right, st->kind, st->last - st->first};
        memcpy(out, values, sizeof values);
    }
    return plan->S;
}

/* Merges the factors of each stage and lays the stages out for the kernels. */
KRU_EXPORT int kru_pack(const kru_plan *plan, const float *const *factors, float *packed) {
    float *dense = malloc(sizeof(float) * (plan->dense_floats + 2));
    if (!dense) return -1;
    for (int s = 0; s < plan->S; s++) {
        const kru_stage *st = &plan->stage[s];
        stage_dense(plan, st, st->last, factors, dense);
        pack_stage(st, plan->lanes, dense, packed + st->w, packed + st->wh);
    }
    free(dense);
    return 0;
}

/* Decaying states end in subnormal numbers, which cost a hundred cycles each: flush them, for one call only. */
static unsigned int flush_subnormals(void) {
#if KRU_X86
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}
static void restore_mode(unsigned int mode) {
#if KRU_X86
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

static int run(const kru_plan *plan, const kru_args *args, int backward) {
    int status;
    unsigned int mode = flush_subnormals();
#if KRU_X86
    if (plan->lanes == 16)
        status = run_avx512(plan, args, backward);
    else if (plan->lanes == 8)
        status = run_avx2(plan, args, backward);
    else
#endif
        status = run_generic(plan, args, backward);
    restore_mode(mode);
    return status;
}

KRU_EXPORT int kru_forward(const kru_plan *plan, const kru_args *args) { return run(plan, args, 0); }
KRU_EXPORT int kru_backward(const kru_plan *plan, const kru_args *args) { return run(plan, args, 1); }

/* Asks for huge pages under a large fresh output: its first write would otherwise cost a page fault each 4 KiB, which
 * took longer than the recurrence itself. Only a hint: nothing happens where the system does not know it. */
KRU_EXPORT void kru_advise(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t huge = (uintptr_t)1 << 21;
    uintptr_t first = ((uintptr_t)memory + huge - 1) & ~(huge - 1), last = ((uintptr_t)memory + bytes) & ~(huge - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

/* Sums the chunks in order and takes merged gradients back to the factors: d_factors[f] is (2,P_f,Q_f), d_bias (N). */
KRU_EXPORT int kru_reduce(const kru_plan *plan, const float *const *factors, int64_t chunks, const float *chunk_grads,
                          float *const *d_factors, float *d_bias) {
    int64_t W = plan->dense_floats, stride = W + plan->N;
    float *sum = calloc(W + 2 * W + 8, sizeof(float));
    if (!sum) return -1;
    memset(d_bias, 0, sizeof(float) * plan->N);
    for (int64_t c = 0; c < chunks; c++) {
        const float *from = chunk_grads + c * stride;
        for (int64_t i = 0; i < W; i++) sum[i] += from[i];
        for (int64_t i = 0; i < plan->N; i++) d_bias[i] += from[W + i];
    }
    for (int s = 0; s < plan->S; s++)
        project_stage(plan, &plan->stage[s], factors, sum + plan->stage[s].dense, sum + W, d_factors);
    free(sum);
    return 0;
}

#include "kru_gated.h"

/* setuptools' extension build on some platforms demands this symbol; the library is never imported as a module. */
KRU_EXPORT void *PyInit__native(void) { return NULL; }
