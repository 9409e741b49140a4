#!/usr/bin/env bash
# Runs the tests in the same environment as run_local.sh; arguments go to pytest.
#
#   scripts/run_tests.sh [tests/test_x.py] [-k WORD] ...
#
# Without arguments the whole suite runs, in two processes; the tests of a module share one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_venv requirements-dev.txt
# The tests of several workers run where Horovod is installed or a wheel of it is at hand.
"$root/scripts/install_horovod.sh" --no_build
export_run_environment
cd "$root"
if (($# == 0)); then
  set -- -n 2 --dist loadgroup --no-loadscope-reorder
fi
exec "$python" -m pytest -q "$@"
