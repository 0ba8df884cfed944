#!/usr/bin/env bash
# Starts a container with this machine's Ascend NPUs. Not run on an NPU machine: none was at hand.
#
#     bash docker/docker_start.sh IMAGE [DATA_FOLDER [MODEL_FOLDER]] [-- COMMAND [ARGUMENT]...]
#
# The folders keep their paths in the container. The container starts in MODEL_FOLDER, or in the image's own folder.
# What a run leaves there stays when the container is gone. Without a command it opens the image's own, a shell.
# ASCEND_DEVICES="0 1" gives it those NPUs alone. By default it gets all.
set -euo pipefail

usage="usage: bash docker/docker_start.sh IMAGE [DATA_FOLDER [MODEL_FOLDER]] [-- COMMAND [ARGUMENT]...]"
dev=${GRU_DEV_ROOT:-}/dev # GRU_DEV_ROOT and GRU_HOST_ROOT stand in for the machine in the tests
host=${GRU_HOST_ROOT:-}

fail() { # message; a usage error
    printf 'error[usage]: %s\n' "${1//[$'\n\r\e']/?}" >&2
    exit 2
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    printf '%s\n' "$usage"
    exit 0
fi

before=()
while (($#)) && [[ $1 != -- ]]; do
    before+=("$1")
    shift
done
if (($#)); then shift; fi
((${#before[@]} >= 1 && ${#before[@]} <= 3)) || fail "expected an image and at most two folders; $usage"
image=${before[0]}
[[ -n $image && $image != -* ]] || fail "'$image' is no image; $usage"

options=(run --rm --interactive --network host --ipc host)
if [[ -t 0 ]]; then options+=(--tty); fi

devices=()
if [[ -n ${ASCEND_DEVICES:-} ]]; then
    for index in $ASCEND_DEVICES; do
        [[ $index =~ ^[0-9]+$ ]] || fail "ASCEND_DEVICES: '$index' is no index of an NPU"
        devices+=("$dev/davinci$index")
    done
else
    for node in "$dev"/davinci[0-9]*; do
        if [[ -e $node ]]; then devices+=("$node"); fi
    done
fi
((${#devices[@]})) || fail "this machine has no $dev/davinci0, so no NPU; see that the driver is installed"
for node in "${devices[@]}" "$dev/davinci_manager" "$dev/devmm_svm" "$dev/hisi_hdc"; do
    [[ -e $node ]] || fail "$node is missing; see that the driver is installed, and run npu-smi info"
    options+=(--device "$node:${node#"${GRU_DEV_ROOT:-}"}")
done

# The driver's libraries and tools. A machine has some of them, depending on its driver's version.
for path in /usr/local/Ascend/driver /usr/local/Ascend/add-ons /usr/local/dcmi /usr/local/bin/npu-smi \
    /usr/local/sbin /etc/ascend_install.info; do
    if [[ -e $host$path ]]; then options+=(--volume "$host$path:$path:ro"); fi
done

for folder in "${before[@]:1}"; do
    [[ -d $folder ]] || fail "'$folder' is no folder; $usage"
    folder=$(cd -- "$folder" && pwd -P)
    [[ $folder != *:* ]] || fail "'$folder' has a colon, which docker takes for the end of a path"
    options+=(--volume "$folder:$folder")
done
if ((${#before[@]} == 3)); then options+=(--workdir "$folder"); fi

exec docker "${options[@]}" "$image" "$@"
