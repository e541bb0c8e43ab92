/* Memory that a step will read or write, fetched a little at a time while the products before it are computed: samples
 * lie a sequence apart, where no hardware prefetcher follows, and a step that is fetched too early is lost again. */
#ifndef KRU_FETCH_H
#define KRU_FETCH_H
#include <stdint.h>

typedef struct {
    const float *from; /* `rows` rows of `floats` numbers, `stride` apart; NULL: nothing */
    int64_t stride, rows, floats;
    int write;
} kru_range;

typedef struct {
    kru_range range[4];
    int count, current;
    int64_t row, at, lines; /* where the next line is, and lines to fetch at a time */
} kru_fetches;

/* Spreads the ranges over `tiles` calls of fetch_some(); 0: fetches nothing. */
static void fetch_plan(kru_fetches *f, int64_t tiles) {
    int64_t lines = 0;
    f->count = f->current = 0;
    f->row = f->at = 0;
    for (int i = 0; i < 4; i++)
        if (f->range[i].from) {
            f->range[f->count] = f->range[i];
            lines += f->range[i].rows * ((f->range[i].floats + 15) / 16);
            f->count++;
        }
    f->lines = tiles ? (lines + tiles - 1) / tiles : 0;
}

static inline __attribute__((always_inline)) void fetch_some(kru_fetches *f) {
    int64_t left = f->lines;
    while (left > 0 && f->current < f->count) {
        const kru_range *r = &f->range[f->current];
        const float *p = r->from + f->row * r->stride + f->at;
        int64_t n = (r->floats - f->at + 15) >> 4;
        if (n > left) n = left;
        left -= n;
        f->at += 16 * n;
        if (r->write)
            for (const float *end = p + 16 * n; p < end; p += 16) __builtin_prefetch(p, 1, 2);
        else
            for (const float *end = p + 16 * n; p < end; p += 16) __builtin_prefetch(p, 0, 2);
        if (f->at >= r->floats) {
            f->at = 0;
            if (++f->row == r->rows) {
                f->row = 0;
                f->current++;
            }
        }
    }
}
#endif
