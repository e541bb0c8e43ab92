/* The native engine's functions called as kru_hf/scan_cpu.py calls them, to be built with the sanitizers:
 *   cc -fsanitize=address,undefined -Ikru_hf/native tests/native_test.c -lm -lpthread && ./a.out CELL K ROWS S ...
 * for cells by name, each with its planes of inputs, rows of the bias and planes of the state. Every array is as long as
 * its shape says, so that a step beyond it is found, and what is to be written holds NaN before. Results must be numbers,
 * the same to the last bit on one thread and on two, and near each other at every width of vectors. */
#include "kru.c"
#include <math.h>
#include <pthread.h>
#include <stdio.h>

#define REQUIRE(what) \
    if (!(what)) return fprintf(stderr, "%s, line %d: %s\n", name, __LINE__, #what), 1

static uint32_t state = 1;
static float uniform(float scale) { return scale * ((float)(state = state * 1664525u + 1013904223u) / 2147483648.0f - 1.0f); }

static float *numbers(int64_t count, float scale) { /* uniform ones within +-scale; scale 0: NaN */
    float *array = malloc(sizeof(float) * count);
    for (int64_t i = 0; i < count; i++) array[i] = scale != 0 ? uniform(scale) : NAN;
    return array;
}
static uint8_t *flags(int64_t count, int wanted) {
    uint8_t *array = wanted ? malloc(count) : NULL;
    for (int64_t i = 0; wanted && i < count; i++) array[i] = uniform(1) > 0;
    return array;
}

static int all_finite(const float *array, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(array[i])) return 0;
    return 1;
}
static double distance(const float *a, const float *b, int64_t count) { /* relative, in norm */
    double off = 0, norm = 1e-30;
    for (int64_t i = 0; i < count; i++) off += pow(a[i] - b[i], 2), norm += pow(b[i], 2);
    return sqrt(off / norm);
}

typedef struct {
    int (*function)(const kru_plan *, kru_args *);
    const kru_plan *plan;
    kru_args *args;
    int failed;
} job;
static void *work(void *given) {
    job *j = given;
    j->failed = j->function(j->plan, j->args);
    return NULL;
}
static int on_threads(int threads, int (*function)(const kru_plan *, kru_args *), const kru_plan *plan, kru_args *args) {
    job job = {function, plan, args, 0}, other = job;
    pthread_t thread;
    args->next = 0;
    if (threads > 1) pthread_create(&thread, NULL, work, &other);
    work(&job);
    if (threads > 1) pthread_join(thread, NULL);
    return job.failed | other.failed;
}

/* Three factors that need not be square, R terms; options: bits for mask, starts, states at the ends. */
static int check(const char *name, int64_t cell, int64_t K, int64_t rows, int64_t S, const int64_t *P, const int64_t *Q,
                 int64_t B, int64_t R, int options) {
    const int64_t T = 3, N = Q[0] * Q[1] * Q[2], O = cell < FIRST_REAL ? 2 : 1, starting = options & 4;
    float *factors[3], *inputs = numbers(B * T * K * N, 1), *bias = numbers(rows * N, 0.3f), *first[2] = {NULL};
    float *initial = starting ? numbers(B * S * N, 1) : NULL, *d_final = starting ? numbers(B * S * N, 1) : NULL;
    float *d_states = numbers(B * T * O * N, 1);
    uint8_t *mask = flags(B * T, options & 1), *starts = flags(B * T, options & 2);
    for (int f = 0; f < 3; f++) factors[f] = numbers(R * K * P[f] * Q[f], 1.2f / sqrtf((float)Q[f]));
    for (int64_t lanes = 4; lanes <= kru_lanes(); lanes *= 2)
        for (int threads = 1; threads <= 2; threads++) {
            int64_t sizes[4];
            kru_plan *plan = kru_plan_new(cell, K, rows, S, B, R, 3, P, Q, lanes, sizes);
            REQUIRE(plan);
            int64_t chunks = ceil_div(B, sizes[2]), total = 0;
            float *packed = numbers(sizes[0], 0), *grads = numbers(chunks * sizes[1], 0), *d_factors[3];
            float *saved = numbers(B * T * (S - O) * N, 0), *final = numbers(B * S * N, 0), *all, *states;
            for (int f = 0; f < 3; f++) total += R * K * P[f] * Q[f];
            /* What is compared, in one array: states, d_inputs, d_initial, d_bias, d_factors. */
            int64_t lengths[4] = {B * T * O * N, B * T * K * N, B * S * N, rows * N}, count = total;
            for (int i = 0; i < 4; i++) count += lengths[i];
            all = states = numbers(count, 0);
            float *d_inputs = states + lengths[0], *d_initial = d_inputs + lengths[1], *d_bias = d_initial + lengths[2];
            d_factors[0] = d_bias + lengths[3];
            for (int f = 1; f < 3; f++) d_factors[f] = d_factors[f - 1] + R * K * P[f - 1] * Q[f - 1];
            kru_args args = {B, T, chunks, packed, inputs, bias, initial, mask, starts, states, saved, final, d_states,
                             d_final, d_inputs, d_initial, grads, 0, 0};
            REQUIRE(!kru_pack(plan, (const float *const *)factors, packed));
            REQUIRE(!on_threads(threads, kru_forward, plan, &args));
            REQUIRE(all_finite(final, B * S * N) && all_finite(saved, B * T * (S - O) * N));
            REQUIRE(!on_threads(threads, kru_backward, plan, &args));
            for (int64_t i = sizes[1]; i < chunks * sizes[1]; i++) grads[i % sizes[1]] += grads[i];
            memcpy(d_bias, grads + sizes[1] - rows * N, sizeof(float) * rows * N);
            REQUIRE(!kru_project(plan, (const float *const *)factors, grads, d_factors));
            REQUIRE(all_finite(all, count));
            if (threads > 1) REQUIRE(!memcmp(first[1], all, sizeof(float) * count));
            if (first[0]) REQUIRE(distance(all, first[0], count) < 1e-4);
            free(first[1]);
            first[1] = all;
            if (!first[0]) memcpy(first[0] = numbers(count, 0), all, sizeof(float) * count);
            free(packed), free(grads), free(saved), free(final), kru_plan_free(plan);
        }
    for (int f = 0; f < 3; f++) free(factors[f]);
    free(first[0]), free(first[1]), free(inputs), free(bias), free(initial), free(d_final), free(d_states), free(mask), free(starts);
    return 0;
}

int main(int argc, char **argv) {
    static const int64_t shapes[][2][3] = {{{1, 1, 1}, {1, 1, 1}}, {{2, 3, 2}, {3, 2, 2}}, {{7, 5, 3}, {5, 3, 7}},
                                           {{2, 33, 3}, {33, 2, 3}}, {{1, 2, 40}, {2, 1, 40}}, {{67, 1, 2}, {67, 2, 1}}};
    for (int i = 1, failed = 0; i + 3 < argc; i += 4) {
        const char *name = argv[i], *at = strstr(kru_cells(), name);
        int64_t cell = 0, facts[3] = {atoi(argv[i + 1]), atoi(argv[i + 2]), atoi(argv[i + 3])}, sizes[4];
        REQUIRE(at);
        for (const char *c = kru_cells(); c < at; c++) cell += *c == ' ';
        REQUIRE(!kru_plan_new(cell, facts[0], 99, facts[2], 1, 1, 3, shapes[1][0], shapes[1][1], 0, sizes));
        REQUIRE(!kru_plan_new(cell, facts[0], facts[1], 9, 1, 1, 3, shapes[1][0], shapes[1][1], 0, sizes));
        for (int64_t s = 0, B = 1; s < 6; s++, B = 3 * B % 19)
            for (int options = 0; options < 8 && !failed; options++)
                failed = check(name, cell, facts[0], facts[1], facts[2], shapes[s][0], shapes[s][1], B, 1 + options % 2, options);
        if (failed) return 1;
    }
    return puts("no faults") < 0;
}
