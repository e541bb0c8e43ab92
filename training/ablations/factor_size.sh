#!/usr/bin/env bash
# Factors of size 2 to N at equal parameters: the state shrinks as the factors grow (200: one N x N factor).
. "$(dirname "$0")/common.sh"
for seed in 0 1 2; do
    for size in 2 4 8 32 200; do
        train "factors-$size-$seed" --factor_size $size --parameter_budget 120000 --seed $seed
    done
done
report
