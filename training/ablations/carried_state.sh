#!/usr/bin/env bash
# The state carried from window to window of a text, or reset to zero.
. "$(dirname "$0")/common.sh"
for seed in 0 1 2; do
    for carry in true false; do
        train "carry-$carry-$seed" --carry_state $carry --seed $seed
    done
done
report
