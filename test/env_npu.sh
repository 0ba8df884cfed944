# shellcheck shell=bash
# Sets up CANN for Ascend NPUs; the wrappers source it. Where there is no CANN it does nothing and says nothing.
# GRU_CANN_INFO and GRU_CANN_ROOT stand in for CANN's own places in the tests.

source_cann() {
    local info=${GRU_CANN_INFO:-/etc/Ascend/ascend_cann_install.info}
    local installed='' found='' root product options=$-

    if [[ -r $info ]]; then
        installed=$(sed -n 's/^[[:space:]]*Install_Path_Param[[:space:]]*=[[:space:]]*//p' "$info" | sed -n '1s/[[:space:]]*$//p')
    fi
    for root in "$installed" "${GRU_CANN_ROOT:-/usr/local/Ascend}"; do
        for product in ascend-toolkit nnae; do
            if [[ -n $root && -r $root/$product/set_env.sh ]]; then
                found=yes
                # CANN's scripts read variables that are not set and run commands that may fail.
                set +eu
                # shellcheck source=/dev/null
                source "$root/$product/set_env.sh"
                if [[ $options == *e* ]]; then set -e; fi
                if [[ $options == *u* ]]; then set -u; fi
                break 2
            fi
        done
    done

    # ASCEND_HOME_PATH: the user has sourced the set_env.sh of a CANN that lies elsewhere.
    if [[ -n $found || -n ${ASCEND_HOME_PATH:-} ]]; then
        export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE-1}
        export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE-2}
        export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF-2}
    fi
}

source_cann
unset -f source_cann
