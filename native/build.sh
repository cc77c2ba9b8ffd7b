#!/usr/bin/env bash
# Build the extension for one interpreter, in place: src/procession/_native.<SOABI>.so
#
#   native/build.sh [--asan|--tsan] [--clean] [PYTHON]      PYTHON: default python3
#
# Incremental. With --asan or --tsan the result is a package of its own in build/<which>-<SOABI>/site
# (the Python files are links to src/procession); the command to use it is printed.
# Uses cmake and ninja where they are installed, the compiler alone where they are not.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
kind=dev clean=0 python=python3
for arg in "$@"; do
  case $arg in
    --asan|--tsan) kind=${arg#--} ;;
    --clean) clean=1 ;;
    -h|--help) sed -n '2,8p' "$0"; exit 0 ;;
    -*) echo "build.sh: unknown option $arg" >&2; exit 2 ;;
    *) python=$arg ;;
  esac
done
python=$("$python" -c 'import sys; print(sys.executable)')
read -r soabi include < <("$python" -c 'import sysconfig as s; print(s.get_config_var("SOABI"), s.get_path("include"))')
build=$root/build/$kind-$soabi
case $kind in
  dev) sanitize= type=RelWithDebInfo out=$root/src/procession flags=(-O2 -g) ;;
  asan) sanitize=address,undefined ;;
  tsan) sanitize=thread ;;
esac
if [ "$kind" != dev ]; then
  type=Debug out=$build/site/procession flags=(-O1 -g -fno-omit-frame-pointer "-fsanitize=$sanitize")
fi
[ "$clean" = 0 ] || rm -rf "$build"
mkdir -p "$build" "$out"
if [ "$kind" != dev ]; then
  find "$out" -maxdepth 1 -type l -delete
  for each in "$root"/src/procession/*; do
    case ${each##*/} in *.so|__pycache__) ;; *) ln -s "$each" "$out/" ;; esac
  done
fi

if command -v cmake >/dev/null && command -v ninja >/dev/null; then
  # Configured once; ninja runs cmake again by itself when CMakeLists.txt or the list of sources changes.
  [ -f "$build/build.ninja" ] || cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=$type \
    -DPROCESSION_SANITIZE=$sanitize -DPROCESSION_OUTPUT_DIR="$out" -DPython_EXECUTABLE="$python" \
    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >"$build/configure.log" 2>&1 ||
    { cat "$build/configure.log" >&2; rm -f "$build/build.ninja"; exit 1; }
  ninja -C "$build" --quiet | sed "/no work to do/d"
else
  cxx=${CXX:-g++}
  flags+=(-std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra
    -fno-strict-aliasing -fno-plt -fno-exceptions -pthread "-I$root/native/include" "-I$root/native/bind" "-I$include")
  newest=$(find native/include native/bind -name '*.hpp' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-)
  objects=() pids=()
  for source in native/bind/*.cpp; do
    object=$build/$(basename "$source" .cpp).o
    objects+=("$object")
    if [ ! -f "$object" ] || [ "$source" -nt "$object" ] || { [ -n "$newest" ] && [ "$newest" -nt "$object" ]; }; then
      "$cxx" "${flags[@]}" -c "$source" -o "$object" & pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  [ "$kind" != dev ] || flags+=(-static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL)
  "$cxx" "${flags[@]}" -shared "${objects[@]}" -o "$out/_native.$soabi.so"
fi
echo "${out#"$root"/}/_native.$soabi.so"
if [ "$kind" != dev ]; then
  runtime=$("${CXX:-g++}" -print-file-name="lib$kind.so")
  case $kind in asan) options='ASAN_OPTIONS=detect_leaks=0' ;; tsan) options='TSAN_OPTIONS=halt_on_error=1' ;; esac
  echo "use: LD_PRELOAD=$runtime $options PYTHONPATH=${out%/procession} PYTHONMALLOC=malloc $python ..."
fi
