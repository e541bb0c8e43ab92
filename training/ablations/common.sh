# Read by the ablations beside it: `train NAME --option …` makes one run, `report` the table of all.
# Usage of each: ABLATION.sh [RECIPE.yaml] [--option value …]; the options hold for every run. A second call goes on
# where the first was stopped. Test splits are not scored: an ablation compares on the validation data.
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
recipe=training/recipes/char_lm.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    recipe=$1
    shift
fi
options=("$@")
# Options are part of the folder's name: other options are other runs.
named=$(basename "$0" .sh)-$(basename "$recipe" .yaml)$(printf '%s' "$*" | tr -cs 'A-Za-z0-9_.' '-')
if [ ${#named} -gt 200 ]; then # file systems end a name at 255 bytes
    named=${named:0:180}-$(printf '%s' "$*" | cksum | cut -d ' ' -f 1)
fi
out=runs/ablations/$named

train() {
    local name=$1
    shift
    if [ -f "$out/$name/all_results.json" ]; then return; fi
    # A run that leaves the finite numbers is a result too: the report names it as not finished.
    accelerate launch -m training.train "$recipe" "${options[@]}" --evaluate_test false "$@" \
        --output_dir "$out/$name" --resume_from_checkpoint last || echo "not finished: $name" >&2
}

report() {
    python -m training.report "$out" --only_runs --folder "$out"
}
