#!/usr/bin/env bash
# Everything that a GPU has to show, in one command under 9 minutes: docs/gpu_suite.md, bash bench/gpu_suite.sh --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT="${OUT:+$(realpath -m "$OUT")}"
# From inside pearl/, so that pearl/__init__.py, and with it torch, is not imported: the suite must run, and say what is
# wrong, where neither works. exec: a signal to this script is a signal to the suite.
cd "$root/pearl"
exec "${PYTHON:-python3}" -m bench.gpu_suite "$@"
