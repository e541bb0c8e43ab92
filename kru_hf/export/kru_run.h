/* A runtime for the models of kru_hf: C99, no dependencies, no threads, no allocation of its own.
 *
 *     size_t memory;
 *     const char *wrong = kru_check(file, bytes, &memory);     the whole of model.kru, at an address that 8 divides
 *     kru *k = kru_open(file, bytes, malloc(memory));          keeps pointers into the file: several may share it
 *     const float *logits = kru_step(k, token);                or kru_frame(k, values); then read, sample, step again
 *
 * A kru is one stream. Letters as in docs/architecture.md: N units, S tensors of the state, V tokens. */
#ifndef KRU_RUN_H
#define KRU_RUN_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define KRU_API __attribute__((visibility("default")))
#else
#define KRU_API
#endif

typedef struct kru kru;

/* What the outputs of a step are. */
enum kru_head {
    KRU_TEXT,     /* logits of the next token (V) */
    KRU_SEQUENCE, /* logits of the classes, given all steps so far */
    KRU_STEPS,    /* logits of the classes of this step */
    KRU_ROLL,     /* logits of each key in the next frame, independent of the others */
    KRU_CHAIN     /* what the keys of the next frame are drawn from, each given the lower ones: see kru_draw */
};

/* NULL if the file is whole and sound, and the bytes of memory that kru_open needs; else what is wrong with it. */
KRU_API const char *kru_check(const void *file, size_t bytes, size_t *memory);
/* A stream at its start, in the memory that the caller brings (at an address that 8 divides). NULL: kru_check says why. */
KRU_API kru *kru_open(const void *file, size_t bytes, void *memory);

KRU_API enum kru_head kru_kind(const kru *k);
KRU_API int kru_vocabulary(const kru *k); /* V, 0 for a model of frames */
KRU_API int kru_inputs(const kru *k);     /* width of a frame, 0 for a model of tokens */
KRU_API int kru_outputs(const kru *k);

/* One step: the outputs (kru_outputs floats, valid until the next call), or NULL for an input that the model does not
 * have. A token below 0 or at least V is not read. */
KRU_API const float *kru_step(kru *k, int token);
KRU_API const float *kru_frame(kru *k, const float *values);
/* Many: tokens (steps) or, if they are NULL, frames (steps, width), to outputs (steps, kru_outputs). 0, or -1 as above. */
KRU_API int kru_sequence(kru *k, const int32_t *tokens, const float *frames, size_t steps, float *outputs);

KRU_API void kru_reset(kru *k); /* back to the state before the first step */
KRU_API int kru_state_size(const kru *k); /* floats: layers * S * N */
KRU_API void kru_get_state(const kru *k, float *state);
KRU_API void kru_set_state(kru *k, const float *state);
/* One step of several streams whose states the caller keeps: tokens (rows), states (layers, rows, S, N), which are
 * replaced, to outputs (rows, kru_outputs). k is left with the last one's. 0, or -1 as above: nothing is read then. */
KRU_API int kru_rows(kru *k, int rows, const int64_t *tokens, float *states, float *outputs);

/* A draw from softmax(logits / temperature), of the most probable entries that have top_p of it together; temperature 0:
 * the largest. `seed` is the state of the generator, any number at first. */
KRU_API int kru_sample(const float *logits, int count, float temperature, float top_p, uint64_t *seed);
/* `count` tokens drawn after the last step, each of which is read in its turn. 0, or -1: not a language model. */
KRU_API int kru_generate(kru *k, int count, float temperature, float top_p, uint64_t *seed, int32_t *tokens);
/* A frame (kru_inputs zeros and ones) drawn after the last one, with `least` to `most` keys: drawn anew until it has so
 * many, 64 times at most, then within the limits. Read it with kru_frame. 1: drawn within the limits, 0: freely, -1: not
 * a model of piano rolls. Temperature and top_p are of which key sounds next (independent keys: of each key's logit). */
KRU_API int kru_draw(kru *k, float temperature, float top_p, int least, int most, uint64_t *seed, float *frame);
/* -log p of a frame of zeros and ones after the last one, in nats. */
KRU_API float kru_nats(kru *k, const float *frame);
/* The text of a token (UTF-8, not ended by a zero) and its length; and the token of the text's first character, with how
 * many bytes that takes, or -1 if the model has none. */
KRU_API const char *kru_text(const kru *k, int token, int *bytes);
KRU_API int kru_token(const kru *k, const char *text, int length, int *bytes);

KRU_API const char *kru_instructions(void); /* which vectors it computes with: avx512, avx2, neon, simd128, generic */
#ifdef __cplusplus
}
#endif
#endif
