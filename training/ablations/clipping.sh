#!/usr/bin/env bash
# Soft unitary constraint against gradient clipping: each alone, both, neither (max_grad_norm 0 turns clipping off);
# strictly unitary factors, clipped; and the recipe as it is, which may bound the norm of W (max_recurrent_norm) too.
. "$(dirname "$0")/common.sh"
for seed in 0 1 2; do
    for weight in 0 0.1; do
        for norm in 0 1; do
            train "soft-$weight-clip-$norm-$seed" --unitary_loss_coef $weight --max_recurrent_norm 0 \
                --max_grad_norm $norm --seed $seed
        done
    done
    train "strict-$seed" --architecture unitary --seed $seed
    train "recipe-$seed" --seed $seed
done
report
