#!/usr/bin/env bash
# Full training on eight devices, or as many as there are: ten epochs, then the score on the test set.
# `bash test/train_full_8p.sh --help` lists the arguments and what it writes; common.sh does the work.
set -euo pipefail

KIND=full
CASE=acc
RANK_SIZE=8 # processes asked for

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"
run_wrapper "$@"
