#!/usr/bin/env bash
# Runs a net on several machines with horovodrun over ssh.
#
#   scripts/run_cluster.sh --hosts=h1:4,h2:4 [--dry_run] nets/<net>_run.py [flags...]
#
#   --hosts=HOST:N,...   N worker processes on each host
#   --dry_run            print the command on one line and leave
# Every host needs this folder at the same path with its environment and Horovod in it, and ssh
# without a password. All other arguments go to the net; rank 0, on the first host, writes the results.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=0 hosts=''
arguments=()
for argument in "$@"; do
  case $argument in
    --dry_run) dry_run=1 ;;
    --hosts=*) hosts=${argument#*=} ;;
    -n | -n=* | --nb_workers* | --nb_gpus*)
      fail "--hosts says how many workers run where; leave $argument out." ;;
    *) arguments+=("$argument") ;;
  esac
done
parse_arguments ${arguments[@]+"${arguments[@]}"}

host='[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?:[1-9][0-9]{0,3}'
[[ $hosts =~ ^$host(,$host)*$ ]] ||
  fail "--hosts must be HOST:WORKERS[,HOST:WORKERS...], as in --hosts=h1:4,h2:4." \
    "Received: --hosts=$hosts"
workers=0
IFS=, read -ra slots <<< "$hosts"
for slot in "${slots[@]}"; do
  workers=$((workers + ${slot##*:}))
done

export_run_environment
command=("$python" "$root/scripts/run_workers.py" "$venv/bin/horovodrun" --gloo -np "$workers"
  -H "$hosts" "$python" "${net_command[@]}" --enbl_multi_gpu)
if ((dry_run)); then
  print_command "${command[@]}"
  exit 0
fi
ensure_venv requirements.txt
need_horovod
exec "${command[@]}"
