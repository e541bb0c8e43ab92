#!/usr/bin/env bash
# Every architecture at one parameter budget, at three learning rates: the first row of each in the report is its best.
. "$(dirname "$0")/common.sh"
for rate in 0.002 0.005 0.015; do
    for architecture in kru unitary; do
        train "$architecture-$rate" --architecture $architecture --parameter_budget 120000 --learning_rate $rate
    done
    for architecture in rnn lstm gru orthogonal low_rank; do
        train "$architecture-$rate" --architecture $architecture --parameter_budget 120000 --learning_rate $rate \
            --num_hidden_layers 1
    done
done
report
