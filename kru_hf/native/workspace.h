/* The memory of one thread: planes of floats by name, filled by one function for the forward and for the backward.
 * A plane holds one number for each unit of a group's samples: (group, N) with lanes over units, (N, VL) with lanes over
 * samples. Letters as in plan.h; S states and O outputs of the cell (its h), of which c planes are multiplied. */
typedef struct {
    int64_t plane;  /* floats from plane to plane */
    float *state;   /* (S, plane): the state before the step; the forward replaces it by the one after */
    float *product; /* (K, plane): W h of every matrix; the backward replaces it by its gradient */
    float *swap[2]; /* (c, plane) each: what passes from stage to stage and is not kept */
    /* the backward alone */
    float *d_state; /* (S, plane): gradient of the state after the step, then of the one before */
    float *passed;  /* (O, plane): gradient that a held step passes on as it is */
    float *inner;   /* (R, M, stages - 1, c, plane): inputs of the stages after the first */
    float *acc;     /* accumulators of the weights' gradients */
    int64_t floats; /* size of it all */
} kru_workspace;

/* Floats of a plane: whole cache lines, and never near a multiple of 4 KiB, at which streams get in each other's way. */
static int64_t plane_floats(const kru_plan *plan) {
    int64_t floats = round_up(plan->group * plan->N, 16) + 16, off = (floats + 80) % 1024;
    return off < 160 ? floats + 160 - off : floats;
}

static float *take(float **memory, int64_t *total, int64_t floats) {
    float *at = *memory ? *memory + *total : NULL;
    *total += round_up(floats, 16);
    return at;
}

/* Names for parts of `memory`, 64-byte aligned; NULL: only the size is asked for. */
static kru_workspace workspace(const kru_plan *plan, int backward, float *memory) {
    kru_facts facts = plan->facts;
    kru_workspace ws = {.plane = plane_floats(plan)};
    int64_t plane = ws.plane, c = plan->c, *n = &ws.floats;
    ws.state = take(&memory, n, facts.states * plane);
    ws.swap[0] = take(&memory, n, c * plane);
    ws.swap[1] = take(&memory, n, c * plane);
    /* A single matrix leaves its product where its last stage would: the less memory, the more of it in the first cache. */
    ws.product = plan->R * plan->M == 1 ? ws.swap[backward || plan->S % 2 == 0] : take(&memory, n, facts.gates * plane);
    if (backward) {
        ws.d_state = take(&memory, n, facts.states * plane);
        ws.passed = take(&memory, n, c * plane);
        ws.inner = take(&memory, n, plan->R * plan->M * (plan->S - 1) * c * plane);
        ws.acc = take(&memory, n, plan->acc_floats);
    }
    return ws;
}
