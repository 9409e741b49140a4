#!/usr/bin/env bash
# Runs a net on this machine, with one or several worker processes.
#
#   scripts/run_local.sh nets/<net>_run.py [-n=N] [--flag=value ...]
#
#   -n=N, -n N, --nb_workers=N, --nb_gpus=N   worker processes, default 1; more than one need Horovod
#                                             (scripts/install_horovod.sh)
# All other arguments go to the net; --help behind its name lists them.
# The first start makes .venv and installs requirements.txt. POCKETSIZE_VENV=DIR uses the existing
# environment DIR as it is instead. Ctrl-C and SIGTERM reach the workers, which save and leave; a
# second one ends them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_arguments "$@"
ensure_venv requirements.txt
export_run_environment
if ((workers == 1)); then
  exec "$python" "${net_command[@]}"
fi
need_horovod
exec "$python" "$root/scripts/run_workers.py" "$venv/bin/horovodrun" --gloo -np "$workers" \
  -H "localhost:$workers" "$python" "${net_command[@]}" --enbl_multi_gpu
