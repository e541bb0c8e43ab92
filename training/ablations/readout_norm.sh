#!/usr/bin/env bash
# The state read with and without RMS normalisation.
. "$(dirname "$0")/common.sh"
for seed in 0 1 2; do
    for norm in true false; do
        train "norm-$norm-$seed" --readout_norm $norm --seed $seed
    done
done
report
