#!/usr/bin/env bash
# The tests of the C++ core, without Python: units, threads under the sanitizers, a kill after every instruction, a model.
#
#   native/tests/run.sh [quick|full]     quick (the default): about two minutes on two cores; full: for the night
#
# One line a check, 'N passed, N failed' at the end; the exit status is 1 when one failed. Needs g++ alone.
set -uo pipefail
cd "$(dirname "$0")" || exit 1
mode=${1:-quick}
case $mode in quick|full) ;; *) sed -n '4,6p' "$0"; exit 2 ;; esac
build=../../build/native-tests
mkdir -p "$build"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-g++}
flags=(-std=c++20 -g -Wall -Wextra -Werror -fno-strict-aliasing -pthread -Wl,-z,now -I../include)
fast=-DPROCESSION_LOCK_SLICE=1000000  # ns: a dead holder is found after 1 ms instead of 20

# Two at a time: name, source, flags.
compile() {
  local target=$build/$1 source=$2
  shift 2
  if [ -x "$target" ] && [ -z "$(find . ../include -name '*.[ch]pp' -newer "$target" -print -quit)" ]; then return; fi
  "$cxx" "${flags[@]}" "$@" "$source" -o "$target" || { rm -f "$target"; echo "FAIL compile $source"; }
}
{
  compile unit unit/unit.cpp -O1 $fast & compile model model/model.cpp -O2 & wait
  compile step crash/step.cpp -O2 $fast & compile threads_tsan threads/hammer.cpp -O1 -fsanitize=thread & wait
  compile threads_asan threads/hammer.cpp -O1 -fsanitize=address,undefined -fno-sanitize-recover=all &
  compile threads_seeded threads/hammer.cpp -O1 -fsanitize=thread -DPROCESSION_SEED_BUG_RELAXED_PUBLISH & wait
  compile unit_asan unit/unit.cpp -O1 -fsanitize=address,undefined -fno-sanitize-recover=all $fast
} | tee "$out/compile"

# run NAME SECONDS COMMAND...: its lines, and one more when it was broken off or said nothing of why it failed.
run() {
  local name=$1 limit=$2 status
  shift 2
  timeout -k 10 "$limit" "$@" 2>"$out/err" | tee -a "$out/all" "$out/one"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || tr '\r' '\n' <"$out/err" | grep -v '^     running ' | head -n 40
  [ "$status" = 0 ] || grep -q '^FAIL' "$out/one" || echo "FAIL $name: status $status" | tee -a "$out/all"
  rm -f "$out/one"
}
under() { sed "s/^\(ok  \|FAIL\) /\1 $1: /"; }

# ThreadSanitizer wants the address space where it expects it.
plain=(); setarch -R true 2>/dev/null && plain=(setarch -R)
rounds=1; [ $mode = full ] && rounds=20

run unit 120 "$build/unit" > >(under unit)
run 'unit, AddressSanitizer' 200 env ASAN_OPTIONS=detect_leaks=0 "$build/unit_asan" > >(under 'unit, asan+ubsan')
run 'threads, AddressSanitizer' 1200 env HAMMER_ROUNDS=$rounds ASAN_OPTIONS=detect_leaks=0 "$build/threads_asan" > >(under 'threads, asan+ubsan')
run 'threads, ThreadSanitizer' 1200 env HAMMER_ROUNDS=$rounds TSAN_OPTIONS='halt_on_error=1 exitcode=66' \
  "${plain[@]}" "$build/threads_tsan" > >(under 'threads, tsan')
# The tests' own test: a publication without release must be reported.
"${plain[@]}" env TSAN_OPTIONS='exitcode=66' timeout 100 "$build/threads_seeded" 'queue: 2 x 2, small' >/dev/null 2>"$out/seeded"
if grep -q 'WARNING: ThreadSanitizer: data race' "$out/seeded"; then
  echo 'ok   threads, tsan: a relaxed publication is reported'
else
  echo 'FAIL threads, tsan: a relaxed publication is not reported'
fi | tee -a "$out/all"
run model 300 "$build/model" $mode > >(cat)
if [ $mode = full ]; then run kill 10800 "$build/step" --full > >(cat); else run kill 300 "$build/step" > >(cat); fi
sleep 0.2  # the last lines may still be under way through sed

passed=$(cat "$out/all" "$out/compile" | grep -c '^ok')
failed=$(cat "$out/all" "$out/compile" | grep -c '^FAIL')
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
