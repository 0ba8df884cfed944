#!/usr/bin/env bash
# Checks the devices of a new machine: bash test/check_device.sh --help
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
KIND=check RANK_SIZE=0 CASE=check # common.sh names its wrappers by these
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

# The program reads the arguments. The name of a conda environment is for this shell alone.
arg_conda_name='' help_of_train=no options=() arguments=()
while (($#)); do
    case $1 in
        --conda_name=* | --conda-name=*) arg_conda_name=${1#*=} ;;
        --conda_name | --conda-name)
            if (($# < 2)); then fail 2 "error[usage]: $1 has no value; test/check_device.sh; write $1=NAME"; fi
            arg_conda_name=$2
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

choose_environment
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} # the caller's folder stays the current one
exec "$python" -m bench.check_device ${arguments[@]+"${arguments[@]}"}
