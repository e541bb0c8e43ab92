#!/bin/sh
# The native engine built with AddressSanitizer and UndefinedBehaviorSanitizer, run through random calls of every cell and
# vector width, forward and backward, on one thread and on two. Ends with 1 at the first finding.
#   tests/sanitize_native.sh [CASES] [PYTHON]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/kru_hf"
cp -r "$root"/kru_hf/*.py "$root"/kru_hf/compiled "$folder/kru_hf"
gcc -shared -fPIC -g -O1 -fno-math-errno -fno-trapping-math -fsanitize=address,undefined -fno-sanitize-recover=all \
    "$root"/kru_hf/native/kru.c -o "$folder/kru_hf/_native.so"
# The interpreter itself is not built with the sanitizers, and keeps memory to its end.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    PYTHONPATH="$folder" "${2:-python}" "$root/tests/fuzz_native.py" "${1:-1000}" --threads 2
