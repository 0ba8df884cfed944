#!/usr/bin/env bash
# Training speed on one device: one epoch, gone round again until 25 steps are done.
# `bash test/train_performance_1p.sh --help` lists the arguments and what it writes; common.sh does the work.
set -euo pipefail

KIND=performance
CASE=perf
RANK_SIZE=1 # processes asked for

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"
run_wrapper "$@"
