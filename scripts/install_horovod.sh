#!/usr/bin/env bash
# Installs Horovod into the virtual environment and checks it, so that `-n=2` works.
#
#   scripts/install_horovod.sh [--wheel=FILE | --force_build | --no_build]
#
# A wheel that pip finds without the network (PIP_FIND_LINKS) is used; otherwise Horovod is built
# from its source distribution, which needs cmake, make and g++ and takes about 8 minutes on 2 cores.
#   --wheel=FILE    install this wheel
#   --force_build   build although a wheel or an installation exists
#   --no_build      install only if a wheel is found; without one, say so and leave with code 0
# POCKETSIZE_VENV=DIR uses the environment DIR instead of .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

version=0.28.1
wheel=
mode=auto
for argument in "$@"; do
  case $argument in
    --help | -h) usage; exit 0 ;;
    --wheel=*) wheel=${argument#*=}; mode=wheel ;;
    --force_build) mode=build ;;
    --no_build) mode='find' ;;
    *) fail "legal arguments are --wheel=FILE, --force_build and --no_build." \
      "Received: $argument" ;;
  esac
done
if [[ $mode == wheel && ! -f $wheel ]]; then
  fail "--wheel must name a file. Received: --wheel=$wheel"
fi

pip_install() {
  "$python" -m pip install --quiet "$@"
}

# Removes the one source file that includes XLA headers which TensorFlow no longer ships (Horovod's
# MPI operations inside XLA; Gloo does not use it), and builds against the TensorFlow of the
# environment.
build() {
  local tool
  for tool in cmake make g++; do
    command -v "$tool" > /dev/null ||
      fail "building Horovod needs $tool, which is not on the PATH" \
        "(Debian and Ubuntu: apt-get install cmake make g++)."
  done
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  # Horovod's setup.py runs already to learn the name and version, hence no isolation here either.
  pip_install -c "$root/constraints.txt" setuptools wheel
  "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary=horovod \
    --dest "$folder" "horovod==$version"
  tar -xzf "$folder/horovod-$version.tar.gz" -C "$folder"
  local source=$folder/horovod-$version
  sed -i.orig '/xla_mpi_ops\.cc/d' "$source/horovod/tensorflow/CMakeLists.txt"

  local external
  external=$("$python" -c '
import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("tensorflow").origin).parent
print(package / "include" / "external")')
  local paths=$external/highwayhash:$external/farmhash_archive/src
  export CPLUS_INCLUDE_PATH=$paths${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}
  export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
  export HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
  printf 'Building Horovod %s (about 8 minutes on 2 cores)\n' "$version" >&2
  PATH=$venv/bin:$PATH pip_install --no-deps --no-build-isolation --no-cache-dir \
    --force-reinstall "$source"
}

# Two real processes have to agree on a sum.
check() {
  local program='
import tensorflow as tf
import horovod.tensorflow as hvd
hvd.init()
total = float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum))
assert (hvd.size(), total) == (2, 3.0), (hvd.size(), total)
hvd.shutdown()'
  TF_CPP_MIN_LOG_LEVEL=2 PATH=$venv/bin:$PATH \
    "$venv/bin/horovodrun" --gloo -np 2 -H localhost:2 "$python" -c "$program"
}

ensure_venv requirements.txt
pip_install -c "$root/constraints.txt" cloudpickle packaging psutil PyYAML
how='was there already'
installed=$("$python" -m pip show horovod 2> /dev/null | sed -n 's/^Version: //p' || true)
case $mode in
  wheel)
    pip_install --no-deps --force-reinstall "$wheel"
    how="from $wheel"
    ;;
  build)
    build
    how='built from source'
    ;;
  *)
    if [[ $installed != "$version" ]]; then
      if pip_install --no-index --no-deps --only-binary=horovod "horovod==$version" 2> /dev/null
      then
        how='from a wheel'
      elif [[ $mode == find ]]; then
        printf 'No wheel of Horovod %s found; it is not installed.\n' "$version"
        exit 0
      else
        build
        how='built from source'
      fi
    fi
    ;;
esac
if ! output=$(check 2>&1); then
  printf '%s\n' "$output" >&2
  printf 'Horovod %s (%s) does not work with this TensorFlow; %s\n' "$version" "$how" \
    'build it with scripts/install_horovod.sh --force_build.' >&2
  exit 1
fi
printf 'Horovod %s works: %s, two processes agreed on a sum.\n' "$version" "$how"
