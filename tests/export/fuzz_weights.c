/* Weight files that are cut, altered and hostile: kru_check refuses them or the model runs, and nothing is read or written
 * outside. fuzz_weights FILE COUNT SEED, built with the sanitizers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kru_run.c"

static uint64_t seed;
static uint32_t below(uint32_t n) { return (uint32_t)(uniform(&seed) * n); }

int main(int count, char **words) {
    FILE *file = fopen(words[1], "rb");
    if (count < 4 || !file) return 2;
    fseek(file, 0, SEEK_END);
    const size_t whole = (size_t)ftell(file);
    uint8_t *original = malloc(whole);
    rewind(file);
    if (fread(original, 1, whole, file) != whole) return 2;
    seed = strtoull(words[3], NULL, 10);
    int accepted = 0;
    for (int i = 0, n = atoi(words[2]); i < n; i++) {
        size_t bytes = below(4) ? whole : below((uint32_t)whole + 1), memory = 0;
        uint8_t *copy = malloc(bytes + !bytes); /* as long as the file: a read past it is seen */
        memcpy(copy, original, bytes);
        for (uint32_t changes = below(4); changes && bytes; changes--) {
            const size_t at = below(below(4) ? (uint32_t)(bytes < 160 ? bytes : 160) : (uint32_t)bytes);
            if (below(2) && at % 4 == 0 && at + 4 <= bytes) { /* a number of the header */
                const uint32_t values[] = {0, 1, 2, 3, 255, 65536, 1u << 26, 1u << 31, ~0u, below(1000)};
                memcpy(copy + at, values + below(10), 4);
            } else
                copy[at] ^= (uint8_t)(1 << below(8));
        }
        if (below(8) && bytes >= sizeof(header)) { /* a file that says of itself that it is whole */
            const uint32_t magic = 0x3155524b, length = (uint32_t)bytes;
            memcpy(copy, &magic, 4), memcpy(copy + 4, &length, 4);
            const uint32_t crc = crc32(copy + 12, bytes - 12);
            memcpy(copy + 8, &crc, 4);
        }
        if (!kru_check(copy, bytes, &memory) && memory < 1u << 28) {
            void *block = malloc(memory);
            kru *k = kru_open(copy, bytes, block);
            if (!k) return 1;
            accepted++;
            float frame[4096] = {0.5f};
            int size;
            for (int t = 0; t < 3; t++)
                if (kru_vocabulary(k))
                    kru_step(k, t), kru_text(k, t, &size), kru_token(k, "the", 3, &size);
                else if (kru_inputs(k) <= 4096)
                    kru_frame(k, frame);
            free(block);
        }
        free(copy);
    }
    printf("%d files, %d accepted\n", atoi(words[2]), accepted);
    free(original);
    fclose(file);
    return 0;
}
