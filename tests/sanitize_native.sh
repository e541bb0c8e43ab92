#!/bin/sh
# Builds the native engine with the address and undefined-behaviour sanitizers and runs its tests on that build.
#   tests/sanitize_native.sh [python] [pytest arguments]
# The compiler is $CC or gcc. Works on a temporary copy: the library in the checkout is left as it is.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python}
[ $# -gt 0 ] && shift
compiler=${CC:-gcc}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/tests"
cp -r "$root/kru_hf" "$copy/kru_hf"
cp "$root"/tests/scan/test_native.py "$root"/tests/scan/problems.py "$copy/tests/"
rm -f "$copy"/kru_hf/_native*.so
"$compiler" -g -O1 -fno-math-errno -fno-trapping-math -fno-omit-frame-pointer -fsanitize=address,undefined \
    -fno-sanitize-recover=undefined -shared -fPIC "$copy/kru_hf/native/kru.c" -o "$copy/kru_hf/_native.so" -lm
cd "$copy"
# Leaks are not looked for: the interpreter and torch keep what they have until the end. torch.compile starts compilers of
# its own, which inherit the preloaded library, so its test stays out.
LD_PRELOAD=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so) \
    ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy" \
    "$python" -m pytest -p no:cacheprovider -q tests -k "not compile and not opcheck" "$@"
