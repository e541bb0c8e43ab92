#!/usr/bin/env bash
# The soft unitary constraint: none, weak, the default, and strictly unitary factors.
. "$(dirname "$0")/common.sh"
for seed in 0 1 2; do
    for weight in 0 0.001 0.1; do
        train "soft-$weight-$seed" --unitary_loss_coef $weight --max_recurrent_norm 0 --seed $seed
    done
    train "strict-$seed" --architecture unitary --seed $seed
done
report
