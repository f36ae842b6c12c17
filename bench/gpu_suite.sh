#!/usr/bin/env bash
# Everything that a GPU has to show, in one command under 10 minutes: docs/gpu_suite.md, bash bench/gpu_suite.sh --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export OUT="${OUT:+$(realpath -m "$OUT")}"
# exec: a signal to this script is a signal to the suite.
cd "$root"
exec "${PYTHON:-python3}" -m bench.gpu_suite "$@"
