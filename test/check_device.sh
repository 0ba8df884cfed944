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
    argument=$1
    shift
    case $argument in
        --conda_name=* | --conda-name=*) value=${argument#*=} ;;
        --conda_name | --conda-name)
            if (($# == 0)) || [[ $1 == --* ]]; then
                fail 2 "error[usage]: $argument has no value; test/check_device.sh; write $argument=NAME"
            fi
            value=$1
            shift
            ;;
        *)
            arguments+=("$argument")
            continue
            ;;
    esac
    if [[ -z $value ]]; then
        fail 2 "error[usage]: --conda_name has an empty value; test/check_device.sh; give it one or leave it out"
    fi
    if [[ -n $arg_conda_name ]]; then
        fail 2 "error[usage]: --conda_name is given twice, $(quoted "$arg_conda_name") and $(quoted "$value"); test/check_device.sh; leave one out"
    fi
    arg_conda_name=$value
done

choose_environment
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} # the caller's folder stays the current one
exec "$python" -m bench.check_device ${arguments[@]+"${arguments[@]}"}
