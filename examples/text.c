/* Text from a model of kru_hf, in C alone.
 *
 *     python -m kru_hf.export --model FOLDER_OR_ID --format c --dtype int8 --output_dir exported
 *     cc -O3 -I exported examples/text.c exported/kru_run.c -o text
 *     ./text "the company said " 200 0.7
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kru_run.h"
#include "weights.h"

int main(int count, char **words) {
    const char *prompt = count > 1 ? words[1] : "the ";
    const int length = count > 2 ? atoi(words[2]) : 200;
    const float temperature = count > 3 ? (float)atof(words[3]) : 0.7f;
    uint64_t seed = count > 4 ? strtoull(words[4], NULL, 10) : 1;

    size_t bytes;
    const char *wrong = kru_check(kru_weights, KRU_WEIGHTS_BYTES, &bytes);
    if (wrong) {
        fprintf(stderr, "weights.h: %s\n", wrong);
        return 1;
    }
    void *memory = malloc(bytes);
    kru *model = memory ? kru_open(kru_weights, KRU_WEIGHTS_BYTES, memory) : NULL;
    if (!model || kru_kind(model) != KRU_TEXT || !*prompt) {
        fprintf(stderr, !model ? "no memory\n" : "a language model and a prompt are needed\n");
        return 1;
    }
    for (const char *at = prompt; *at;) {
        int size, token = kru_token(model, at, (int)strlen(at), &size);
        if (token < 0) {
            fprintf(stderr, "the model does not know the character at: %s\n", at);
            return 1;
        }
        kru_step(model, token);
        at += size;
    }
    fputs(prompt, stdout);
    for (int i = 0; i < length; i++) {
        int32_t token;
        int size;
        kru_generate(model, 1, temperature, 0.95f, &seed, &token);
        const char *text = kru_text(model, token, &size);
        fwrite(text, 1, (size_t)size, stdout);
        fflush(stdout);
    }
    putchar('\n');
    free(memory);
    return 0;
}
