#!/usr/bin/env bash
# Runs a net in a container; arguments as for run_local.sh.
#
#   scripts/run_docker.sh [--dry_run] [--gpus=all] [--image=NAME] nets/<net>_run.py [-n=N] [flags...]
#
#   --dry_run      print the docker command on one line and leave
#   --gpus=SET     GPUs for the container, as in `docker run --gpus`
#   --image=NAME   run this image; without it, the image `pocketsize` is built first
# The data folder (--data_dir_local, else the environment, else path.conf) is mounted read-only at
# /data, --pretrained, --save_path_dst and --flagfile read-only beside it. --work_dir, by default the folder `runs`
# here, is mounted writable, so results survive and belong to the calling user. Scripts in `nets` are
# those of the image.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

inside=/pocketsize    # the repository inside the image, where runs start
dry_run=0 image='' gpus=() mounts=()

# mount SOURCE TARGET [readonly]: SOURCE becomes absolute.
mount() {
  local source
  source=$(realpath -m "$1")
  [[ $source != *,* ]] || fail "docker mounts no path with a comma. Received: $source"
  mounts+=(--mount "type=bind,source=$source,target=$2${3:+,$3}")
}

# The data folder without a flag: environment, then path.conf; empty if neither names one.
default_data() {
  local name variable conf data
  name=$(basename "$script" | sed -n 's/.*_at_\(.*\)_run\.py$/\1/p')
  [[ $name =~ ^[a-z0-9_]+$ ]] || return 0
  variable=POCKETSIZE_DATA_DIR_$(tr '[:lower:]' '[:upper:]' <<< "$name")
  data=${!variable:-}
  for conf in path.conf "$root/path.conf"; do
    if [[ -z $data && -f $conf ]]; then
      data=$(sed -n "s/^ *data_dir_local_$name *= *//p" "$conf" | sed 's/ *#.*//; s/ *$//' | tail -n 1)
      data=${data#None}
    fi
  done
  printf '%s' "${data/#\~/$HOME}"
}

arguments=()
for argument in "$@"; do
  case $argument in
    --dry_run) dry_run=1 ;;
    --gpus=*) gpus=(--gpus "${argument#*=}") ;;
    --image=*) image=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
parse_arguments ${arguments[@]+"${arguments[@]}"}

data='' work_dir='' flags=()
set -- "${net_command[@]:1}"
while (($#)); do
  name=${1%%=*} value=${1#*=}
  case $name in
    --data_dir_local | --work_dir | --pretrained | --save_path_dst | --flagfile)
      if [[ $1 != *=* ]]; then
        (($# > 1)) || fail "$name needs a value."
        value=$2
        shift
      fi
      ;;
  esac
  case $name in
    --data_dir_local) data=$value ;;
    --work_dir) work_dir=$value ;;
    --pretrained | --save_path_dst | --flagfile)
      [[ -f $value ]] || fail "$name must name a file. Received: $name=$value"
      # Numbered, since two flag files may have the same name in different folders.
      target=/${name#--}/${#mounts[@]}/$(basename "$value")
      mount "$value" "$target" readonly
      flags+=("$name=$target")
      ;;
    *) flags+=("$1") ;;
  esac
  shift
done

data=${data:-$(default_data)}
if [[ -d $data ]]; then
  mount "$data" /data readonly
  flags+=(--data_dir_local=/data)
elif [[ -f $data ]]; then
  mount "$data" "/data/$(basename "$data")" readonly
  flags+=("--data_dir_local=/data/$(basename "$data")")
elif [[ -n $data ]]; then
  fail "the data folder must exist. Received: $data"
fi
if [[ -n $work_dir ]]; then
  results=$work_dir
  target=$inside/work
  flags+=("--work_dir=$target")
else
  results=runs
  target=$inside/runs
fi
if ((!dry_run)) && ! docker info > /dev/null 2>&1; then
  fail "no Docker engine answers here; start one, or use scripts/run_local.sh."
fi
if ((!dry_run)); then
  mkdir -p "$results"
fi
mount "$results" "$target"

terminal=()
if [[ -t 0 && -t 1 ]]; then
  terminal=(-it)
fi
command=(docker run --rm --init ${terminal[@]+"${terminal[@]}"} --user "$(id -u):$(id -g)"
  --env HOME=/tmp ${gpus[@]+"${gpus[@]}"} "${mounts[@]}" "${image:-pocketsize}"
  "${script#"$root/"}" "-n=$workers" ${flags[@]+"${flags[@]}"})
if ((dry_run)); then
  print_command "${command[@]}"
  exit 0
fi
if [[ -z $image ]]; then
  docker build --quiet --tag pocketsize "$root" > /dev/null
fi
exec "${command[@]}"
