# Sourced by the other scripts: the virtual environment, arguments, and how a script refuses them.
#
# POCKETSIZE_VENV=DIR uses the existing environment DIR as it is; nothing is created or installed.
# shellcheck shell=bash disable=SC2034  # variables that the others read

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${POCKETSIZE_VENV:-$root/.venv}
python=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Says one sentence on standard error and ends with exit code 2: the user can mend this.
fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints the comment at the head of the calling script: from its second line to the first line that
# is not a comment.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

# Prints a command on one line as a shell would have to read it.
print_command() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Makes the environment if there is none, and installs a requirements file unless the file and
# constraints.txt are those of the last installation that succeeded. The stamp is a copy of the two.
#   ensure_venv requirements.txt
ensure_venv() {
  local requirements=$root/$1 stamp=$venv/.pocketsize/$1
  if [[ -n ${POCKETSIZE_VENV:-} ]]; then
    [[ -x $python ]] || fail "POCKETSIZE_VENV must be a virtual environment with bin/python." \
      "Received: POCKETSIZE_VENV=$venv."
    return
  fi
  if cmp -s "$stamp" <(cat "$requirements" "$root/constraints.txt"); then
    return
  fi
  mkdir -p "$venv/.pocketsize"
  (
    # Two first starts at once: the second waits, then finds the work done.
    if command -v flock > /dev/null; then
      flock 9
    fi
    if cmp -s "$stamp" <(cat "$requirements" "$root/constraints.txt"); then
      exit 0
    fi
    install_requirements "$requirements"
    cat "$requirements" "$root/constraints.txt" > "$stamp.partial"
    mv "$stamp.partial" "$stamp"
  ) 9> "$venv/.pocketsize/lock"
}

install_requirements() {
  if ! "$python" -m pip --version > /dev/null 2>&1; then
    command -v python3.11 > /dev/null ||
      fail "Python 3.11 is needed and python3.11 is not on the PATH; install it and start again."
    python3.11 -c 'import ensurepip, venv' 2> /dev/null ||
      fail "python3.11 cannot make virtual environments; install its venv module" \
        "(Debian and Ubuntu: apt-get install python3.11-venv) and start again."
    printf 'Making the virtual environment %s\n' "$venv" >&2
    python3.11 -m venv "$venv" >&2
  fi
  printf 'Installing %s (once)\n' "$(basename "$1")" >&2
  "$python" -m pip install --quiet -c "$root/constraints.txt" -r "$1" >&2
}

# Reads `nets/x_run.py [-n=N] [flags...]` into workers, script, and net_command: the script with its
# flags. Prints the usage on --help before the script.
parse_arguments() {
  local flags=()
  script='' workers=1
  while (($#)); do
    case $1 in
      --help | -h)
        if [[ -z $script ]]; then
          usage
          exit 0
        fi
        flags+=("$1")
        ;;
      -n=* | --nb_workers=* | --nb_gpus=*) workers=${1#*=} ;;
      -n | --nb_workers | --nb_gpus)
        (($# > 1)) || fail "$1 needs the number of workers, as in -n=2."
        workers=$2
        shift
        ;;
      -*) flags+=("$1") ;;
      *)
        if [[ -z $script ]]; then
          script=$1
        else
          flags+=("$1")
        fi
        ;;
    esac
    shift
  done
  [[ $workers =~ ^[1-9][0-9]{0,3}$ ]] ||
    fail "the number of workers must be a whole number from 1 to 9999. Received: -n=$workers"
  if [[ -n $script && ! -f $script && -f $root/$script ]]; then
    script=$root/$script
  fi
  [[ -f $script ]] || fail "the first argument must be a net's script, one of" \
    "$(list_scripts). Received: ${script:-nothing}"
  net_command=("$script" ${flags[@]+"${flags[@]}"})
}

list_scripts() {
  local path names=()
  for path in "$root"/nets/*_run.py; do
    names+=("nets/$(basename "$path")")
  done
  local IFS=,
  printf '%s' "${names[*]}" | sed 's/,/, /g'
}

# What every worker needs: our packages, TensorFlow without its start-up messages, and one arena of
# glibc's malloc. The others give every large tensor that is freed back to the system, and each step
# of training then waits for its pages to be mapped again (docs/benchmarks.md, Memory).
export_run_environment() {
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1}
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
}

need_horovod() {
  "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("horovod"))' ||
    fail "several workers need Horovod; install it with scripts/install_horovod.sh, or leave -n out."
}
