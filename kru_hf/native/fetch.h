/* Memory that a step will read or write, fetched a little at a time while the products before it are computed: samples
 * lie a sequence apart, where no hardware prefetcher follows, and a step that is fetched too early is lost again. */
typedef struct {
    const float *from; /* `rows` rows of `floats` numbers, `stride` apart; NULL: nothing */
    int64_t stride, rows, floats;
} kru_range;

typedef struct {
    kru_range range[3];
    int current;
    int64_t row, at, lines; /* where the next line of 16 floats is, and lines to fetch at a time */
} kru_fetches;

/* Spreads the ranges over `tiles` calls of fetch_some(); 0: fetches nothing. */
static void fetch_plan(kru_fetches *f, int64_t tiles) {
    for (kru_range *r = f->range; r < f->range + 3; r++) f->lines += r->from ? r->rows * ((r->floats + 15) / 16) : 0;
    f->lines = tiles ? (f->lines + tiles - 1) / tiles : 0;
}

static inline __attribute__((always_inline)) void fetch_some(kru_fetches *f) {
    for (int64_t left = f->lines; left > 0 && f->current < 3;) {
        const kru_range *r = &f->range[f->current];
        if (!r->from || f->row == r->rows) {
            f->current++;
            f->row = 0;
            continue;
        }
        const float *p = r->from + f->row * r->stride + f->at;
        int64_t n = (r->floats - f->at + 15) / 16;
        if (n > left) n = left;
        for (int64_t i = 0; i < n; i++) __builtin_prefetch(p + 16 * i, 0, 2);
        left -= n;
        if ((f->at += 16 * n) < r->floats) continue;
        f->at = 0;
        f->row++;
    }
}
