# shellcheck shell=bash
# What the four wrappers share: read the arguments, run train_8p.py, and have result.py write and print the results.
# A wrapper sets KIND (full, performance), CASE (acc, perf) and RANK_SIZE (1, 8), sources this, calls run_wrapper "$@".
# Kept to what old shells have (bash 3.2 on macOS, 4.2 on CentOS 7): no associative or, under `set -u`, empty arrays.

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
repo=$(dirname -- "$here")
name=train_${KIND}_${RANK_SIZE}p.sh
network=GRU_ID0104_for_PyTorch

keys="data_path batch_size learning_rate epochs precision_mode device device_list device_id recipe conda_name resume \
restarts accept_bleu profiling over_dump data_dump_flag data_dump_step"

run_wrapper() {
    parse_arguments "$@"
    choose_environment
    check_arguments
    prepare_output
    add_options_of_the_folder
    run_training
    write_results
}

fail() { # exit code, message
    printf '%s\n' "${2//[$'\n\r\e']/?}" >&2 # one line, whatever the names in it are
    exit "$1"
}

quoted() { # a value of the user's on one line, as a shell takes it, so that its control characters are escaped
    case $1 in
        '' | *[!a-zA-Z0-9,./_=:+-]*) printf %q "$1" ;;
        *) printf %s "$1" ;;
    esac
}

usage() {
    local task devices batch rate="the recipe's" epochs device_list device_id checkpoint='' goes_on='' accept='taken by full runs alone'
    if [[ $KIND == full ]]; then
        task='Trains ten epochs with validation, then scores the best checkpoint on the test set (BLEU)'
        batch="the recipe's: tuned 64, on several devices 128, on sample/ 32; modelzoo 512"
        rate+=$';\n                         tuned: 0.003, times the root of batch / 64 where that is above 1'
        epochs="the recipe's, 10"
        checkpoint=', where the best checkpoint, seq2seq-gru-model.pth.tar, is left too'
        goes_on=$',\n                         with --resume=auto'
        accept='end with exit code 8, after all results, if BLEU is below X; default: any BLEU will do'
    else
        task='Measures the speed of training: one epoch, gone round again until 25 steps are done, the first 5 not timed'
        epochs=1
        batch='1536 a device on NPU and CUDA, 128 a process on CPU; at most the corpus'
    fi
    if ((RANK_SIZE == 1)); then
        devices='One device'
        device_list="  --device_list=I        the device's index; default: that of --device_id, otherwise the first device"
        device_id="the number of the NPU or GPU, and of the output folder and the log; default: ASCEND_DEVICE_ID,
                         which chooses an NPU and the folder but no GPU, otherwise 0"
    else
        devices='Eight devices, one process each'
        device_list="  --device_list=I,J,...  the devices' indices, one process each; default: the first eight, or as many as the
                         machine has; on CPU eight processes"
        device_id="the number of the output folder and the log; it chooses no device; default: ASCEND_DEVICE_ID,
                         otherwise 0"
    fi
    cat <<END
Usage: bash test/$name [--key=value | --key value]... [-- arguments for train_8p.py]

$task.
$devices.

  --data_path=DIR        the corpus; Multi30k is downloaded if DIR has none; default: the repository's sample/
  --batch_size=N         sentence pairs a step, in total over the devices;
                         default: $batch
  --learning_rate=X      the peak learning rate; default: $rate
  --epochs=N             times through the corpus; default: $epochs
  --precision_mode=MODE  allow_mix_precision or amp: mixed precision O2; must_keep_origin_dtype: fp32;
                         default: allow_mix_precision
  --device=NAME          npu, cuda, cpu, or auto: npu, else cuda, else cpu; default: auto
$device_list
  --device_id=N          $device_id
  --recipe=NAME          tuned or modelzoo; default: tuned
  --conda_name=NAME      a conda environment to activate first; default: none
  --resume=auto          go on with a run that was stopped or killed; or the path of its state
  --restarts=N           start the run again, N times at most, after one of its processes has died or hung$goes_on;
                         default: 0
  --accept_bleu=X        $accept
  --profiling=True       record a few steps with torch's profiler, into the run's own folder; default: False
  --over_dump=True       taken as in the ModelZoo, but no overflow is dumped: a note says so; default: False
  --data_dump_flag=True  taken as in the ModelZoo, but no tensor is dumped: a note says so; default: False
  --data_dump_step=N     the step of --data_dump_flag, likewise without effect; default: 10
  --help, -h             this text

What follows a lone -- goes to train_8p.py untouched and wins over the above; bash test/$name -- --help lists it.
Relative paths are relative to the current folder$checkpoint.

Environment: ASCEND_DEVICE_ID, the number that --device_id leaves out; PYTHON, the interpreter (default: that of the
repository's .venv, else python3); etp_running_flag=true: do not look for CANN.

Writes into $repo/test/output/N, where N is that number
and CASE is ${network}_bs<BatchSize>_${RANK_SIZE}p_$CASE:
  train_N.log                  the whole run
  train_CASE_loss.txt          one loss a line
  CASE.log                     the result, as Key = value lines; RankSize is the number of processes that ran
  runs/<UTC start>_${name%.sh}/  the same of each run, as train_N.log, train_CASE_loss.txt, CASE_<precision>.log;
                               CASE_<precision>.json, with figures by epoch; metrics.jsonl, with those of each line;
                               curves.png, where matplotlib is installed; profile/, with --profiling=True;
                               metrics.jsonl and curves.png stand in DIR instead with --record=DIR after the --
The first three are of the last run of this wrapper, and are replaced when the next one begins to train. No run touches
the folder of another. A run that fails before it trains, for a bad argument, a wrong folder or an absent device,
replaces nothing.
END
}

parse_arguments() {
    local argument key value variable later='^\+?0*[1-9][0-9]*$'
    # Set here, or variables of these names in the caller's environment would count as arguments.
    arg_data_path='' arg_batch_size='' arg_learning_rate='' arg_epochs='' arg_precision_mode=''
    arg_device='' arg_device_list='' arg_recipe='' arg_conda_name='' arg_restarts='' arg_resume=''
    arg_device_id='' arg_accept_bleu='' arg_profiling='' arg_over_dump='' arg_data_dump_flag='' arg_data_dump_step=''

    while (($#)) && [[ $1 != -- ]]; do
        argument=$1
        shift
        if [[ $argument == --help || $argument == -h ]]; then
            usage
            exit 0
        fi
        key=${argument%%=*}
        key=${key#--}
        key=${key//-/_}
        if [[ $argument != --* || $key == *[!a-z_]* || " $keys " != *" $key "* ]]; then
            fail 2 "error[usage]: unknown argument $(quoted "$argument"); test/$name; it takes --${keys// / --} --help, and train_8p.py's own after a lone --"
        fi
        if [[ $argument == *=* ]]; then
            value=${argument#*=}
        elif (($#)) && [[ $1 != --* ]]; then
            value=$1
            shift
        else
            fail 2 "error[usage]: --$key has no value; test/$name; write --$key=VALUE"
        fi
        if [[ -z $value ]]; then
            fail 2 "error[usage]: --$key has an empty value; test/$name; give it one or leave it out"
        fi
        variable=arg_$key
        if [[ -n ${!variable} ]]; then
            fail 2 "error[usage]: --$key is given twice, $(quoted "${!variable}") and $(quoted "$value"); test/$name; leave one out"
        fi
        printf -v "$variable" %s "$value"
    done

    # In the form --flag=value a value may begin with a hyphen.
    options=("$repo/train_8p.py")
    if [[ -n $arg_data_path ]]; then options+=("--data-dir=$arg_data_path"); fi
    if [[ -n $arg_batch_size ]]; then options+=("--batch-size=$arg_batch_size"); fi
    if [[ -n $arg_learning_rate ]]; then options+=("--lr=$arg_learning_rate"); fi
    if [[ -n $arg_epochs ]]; then options+=("--epochs=$arg_epochs"); fi
    if [[ -n $arg_device ]]; then options+=("--device=$arg_device"); fi
    if [[ -n $arg_recipe ]]; then options+=("--recipe=$arg_recipe"); fi
    if [[ -n $arg_resume ]]; then options+=("--resume=$arg_resume"); fi
    case ${arg_precision_mode:-${arg_resume:+that of the run}} in
        '' | allow_mix_precision | amp) options+=(--amp --opt-level=O2) ;;
        must_keep_origin_dtype) options+=(--opt-level=O0) ;;
        'that of the run') ;;
        *) fail 2 "error[usage]: precision_mode is $(quoted "$arg_precision_mode"); test/$name; it is one of allow_mix_precision, amp, must_keep_origin_dtype" ;;
    esac
    if ((RANK_SIZE == 1)) && [[ $arg_device_list == *,* ]]; then
        fail 2 "error[usage]: device_list has more than one entry: $(quoted "$arg_device_list"); test/$name; name one device, or use test/train_${KIND}_8p.sh"
    fi
    choose_number
    if ((RANK_SIZE > 1)); then
        options+=(--multiprocessing-distributed)
    elif [[ -n $arg_device_id ]]; then
        options+=("--device-id=$id")
    elif [[ -n ${ASCEND_DEVICE_ID:-} ]]; then
        options+=("--device-id=npu:$id")
    fi
    if [[ -n $arg_device_list ]]; then
        options+=("--device-list=$arg_device_list")
    elif ((RANK_SIZE > 1)); then
        options+=("--max-devices=$RANK_SIZE")
    fi
    if [[ $KIND == performance ]]; then options+=(--performance); fi

    restarts=${arg_restarts:-0}
    if [[ $restarts == *[!0-9]* || ${#restarts} -gt 4 ]]; then
        fail 2 "error[usage]: restarts is $(quoted "$restarts"); test/$name; give a number below 10000"
    fi
    restarts=$((10#$restarts)) # 010 is ten
    check_accept_bleu
    check_debugging

    options_of_a_restart "$@"
    help_of_train=no
    value_of --rank "$@"
    if [[ $value =~ $later ]]; then
        fail 2 "error[usage]: a wrapper reports what node 0 prints, and this is node $value; --rank; start python3 $repo/train_8p.py here itself, see docs/several-machines.md"
    fi
    value_of --record "$@"
    record=$value # or nothing: the run's own folder
    if (($# > 1)); then
        options+=("$@") # the lone -- is its first
        for argument in "$@"; do
            if [[ $argument == --help || $argument == -h ]]; then help_of_train=yes; fi
            if [[ $KIND == full && $argument == --performance ]]; then
                fail 2 "error[usage]: --performance scores nothing, and this wrapper reports a score; test/$name; use test/train_performance_${RANK_SIZE}p.sh"
            fi
            if [[ ${argument%%=*} == --evaluate ]]; then
                fail 2 "error[usage]: --evaluate trains nothing, and a wrapper reports a training; test/$name; run python3 $repo/train_8p.py --evaluate CHECKPOINT"
            fi
        done
    fi
}

choose_number() { # sets id
    local whence=device_id
    if [[ -n $arg_device_id ]]; then
        export ASCEND_DEVICE_ID=$arg_device_id
    else
        whence=ASCEND_DEVICE_ID
    fi
    id=${ASCEND_DEVICE_ID:-0}
    if [[ $id == *[!0-9]* || ${#id} -gt 9 ]]; then
        fail 2 "error[usage]: $whence is $(quoted "$id"); test/$name; make it a number of at most nine digits"
    fi
}

check_accept_bleu() {
    local number='^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)$'
    if [[ -z $arg_accept_bleu ]]; then return; fi
    if [[ $KIND == performance ]]; then
        fail 2 "error[usage]: a performance run has no BLEU to accept; --accept_bleu; use test/train_full_${RANK_SIZE}p.sh"
    fi
    if [[ ! $arg_accept_bleu =~ $number ]]; then
        fail 2 "error[usage]: accept_bleu is $(quoted "$arg_accept_bleu"); test/$name; give a number from 0 to 100, such as 29.5"
    fi
}

check_debugging() { # sets note
    local asked='' steps='^[0-9]+(\|[0-9]+)*$'
    check_switch profiling "$arg_profiling"
    check_switch over_dump "$arg_over_dump"
    check_switch data_dump_flag "$arg_data_dump_flag"
    if [[ -n $arg_data_dump_step && ! $arg_data_dump_step =~ $steps ]]; then
        fail 2 "error[usage]: data_dump_step is $(quoted "$arg_data_dump_step"); test/$name; give a step such as 10, or several such as 0|5|10"
    fi
    if [[ $arg_over_dump == True ]]; then asked=--over_dump; fi
    if [[ $arg_data_dump_flag == True ]]; then asked+="${asked:+ and }--data_dump_flag"; fi
    note=${asked:+"note: $asked: nothing is dumped here; the log counts the steps whose gradients were not finite"}
}

check_switch() { # key, value
    case $2 in
        '' | True | False) ;;
        *) fail 2 "error[usage]: $1 is $(quoted "$2"); test/$name; it is True or False" ;;
    esac
}

value_of() { # a flag of train_8p.py, then arguments; sets value: the last one that they give the flag, or nothing
    local argument flag=$1 before=''
    value=''
    shift
    for argument in "$@"; do
        if [[ $before == "$flag" ]]; then
            value=$argument
        elif [[ $argument == "$flag="* ]]; then
            value=${argument#*=}
        fi
        before=$argument
    done
}

options_of_a_restart() { # the lone -- and what follows it, or nothing; makes again from the wrapper's options and this
    local argument goes_on=${arg_resume}
    for argument in "$@"; do
        if [[ ${argument%%=*} == --resume ]]; then goes_on=$argument; fi
    done
    again=("${options[@]}" "$@")
    # A performance run leaves nothing to go on from.
    if [[ $KIND == performance || -n $goes_on ]]; then return; fi
    if (($# == 0)); then again+=(--); fi
    again+=(--resume=auto)
}

choose_environment() {
    # torch would load torch_npu by itself, and `import torch` would raise where CANN is missing.
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0
    if [[ ${etp_running_flag:-} != true ]]; then
        # shellcheck source-path=SCRIPTDIR source=env_npu.sh
        source "$here/env_npu.sh"
    fi

    python=python3
    if [[ -n $arg_conda_name ]]; then
        activate_conda "$arg_conda_name"
    elif [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
    elif [[ -x $repo/.venv/bin/python3 ]]; then # also where conda's base is active, as on many machines
        python=$repo/.venv/bin/python3
    fi
    if ! command -v -- "$python" >/dev/null; then
        fail 2 "error[usage]: there is no Python interpreter $(quoted "$python"); PATH and PYTHON; install Python 3.10 or newer, or set PYTHON to one"
    fi
    if [[ $help_of_train == yes ]]; then exec "$python" "${options[@]}"; fi
}

check_arguments() {
    # By the program's own parser, before an earlier run's files are touched. The program would say the same, but later.
    local start
    start=$("$python" "${options[0]}" --parse-only ${options[1]+"${options[@]:1}"} </dev/null) || exit "$?"
    case "$KIND $start" in # what a file of flags says, which is not seen here
        'full '*': measures') fail 2 "error[usage]: the file of --config has performance = true, and this wrapper reports a score; test/$name; use test/train_performance_${RANK_SIZE}p.sh" ;;
        'performance '*': trains') fail 2 "error[usage]: the file of --config has performance = false, and this wrapper measures speed; test/$name; use test/train_full_${RANK_SIZE}p.sh" ;;
        *': evaluates') fail 2 "error[usage]: the file of --config has evaluate, and a wrapper reports a training; test/$name; leave it out" ;;
    esac
    # Where there is nothing to go on with, the precision is a new run's.
    if [[ -z $arg_precision_mode && -n $arg_resume && ${start%%:*} == begins ]]; then
        options=("${options[0]}" --amp --opt-level=O2 "${options[@]:1}")
        again=("${again[0]}" --amp --opt-level=O2 "${again[@]:1}")
    fi
}

activate_conda() { # name
    local conda base done=no
    conda=$(command -v conda || printf %s "${CONDA_EXE:-}")
    if [[ -z $conda ]]; then
        fail 2 "error[usage]: conda_name=$(quoted "$1") is given, but there is no conda; PATH; install conda, or leave conda_name out"
    fi
    if [[ $1 != -* ]] && base=$("$conda" info --base 2>/dev/null) && [[ -r $base/etc/profile.d/conda.sh ]]; then
        # conda's scripts read variables that are not set.
        set +eu
        # shellcheck source=/dev/null
        source "$base/etc/profile.d/conda.sh" && conda activate "$1" && done=yes
        set -eu
    fi
    if [[ $done == no ]]; then
        fail 2 "error[usage]: conda cannot activate $(quoted "$1"); conda_name; see 'conda env list'"
    fi
}

prepare_output() {
    local holder start number=1
    output=$repo/test/output/$id
    log=$output/train_$id.log
    if [[ -d $log ]] || ! { mkdir -p -- "$output/runs" && : >>"$output/.lock"; } 2>/dev/null; then
        fail 5 "error[io]: cannot write; $output; make it a folder that you may write"
    fi

    # The lock belongs to descriptor 9, which only this shell keeps: however it ends, the lock ends with it.
    exec 9<>"$output/.lock"
    if ! try_lock; then
        IFS= read -r holder <"$output/.lock" || true
        fail 5 "error[io]: in use by pid $(quoted "${holder:-unknown}"); $output; wait for it to end, or set ASCEND_DEVICE_ID to another number"
    fi
    printf '%s\n' "$$" >"$output/.lock"

    start=$output/runs/$(date -u +%Y%m%dT%H%M%SZ)_${name%.sh}
    folder=$start
    while [[ -e $folder ]]; do # two runs in one second
        number=$((number + 1))
        folder=${start}_$number
    done
    run_log=$folder/train_$id.log
    earlier=$output/runs/earlier number=1 # for files that no run's folder has
    while [[ -e $earlier ]]; do
        number=$((number + 1))
        earlier=$output/runs/earlier_$number
    done
    # The log of a run that began to train stays under its name until another one does.
    if ! { mkdir -- "$folder" && : >"$run_log" && rm -f -- "$output"/*.tmp &&
        if ! began "$log"; then retire "$log" && share "$run_log" "$log"; fi; } 2>/dev/null; then
        fail 5 "error[io]: cannot replace an earlier run's files; $output; make them writable or remove them"
    fi
}

add_options_of_the_folder() {
    local own=("--record=$folder")
    if [[ $arg_profiling == True ]]; then own+=("--profile=$folder/profile"); fi
    options=("${options[0]}" "${own[@]}" "${options[@]:1}")
    again=("${again[0]}" "${own[@]}" "${again[@]:1}")
}

retire() { # files of the output folder, or a pattern that no file has: their runs have them too
    local file
    for file in "$@"; do
        if [[ ! -e $file ]]; then continue; fi
        if [[ -z $(find "$file" -links 1) ]] || has_a_run "$file"; then
            rm -f -- "$file" || return
        else # it is older than the runs' folders
            mkdir -p -- "$earlier" && mv -- "$file" "$earlier" || return
        fi
    done
}

has_a_run() { # file of the output folder: whether it is empty, or a file of a run begins with it: a copy of that one
    local own base=${1##*/} size
    if [[ ! -s $1 ]]; then return 0; fi
    size=$(wc -c <"$1") || return
    for own in "$output/runs"/*/"$base" "$output/runs"/*/"${base%.log}"_*.log; do
        # A killed run's copy is shorter.
        if [[ -f $own ]] && head -c "$((size))" -- "$own" | cmp -s - "$1"; then return 0; fi
    done
    return 1
}

share() { # a file of the run, a second name for it: where the disk has no hard links, a copy
    [[ $1 -ef $2 ]] || ln -f -- "$1" "$2" 2>/dev/null || cp -f -- "$1" "$2"
}

began() { # whether a log is that of a run that began to train
    [[ -f $1 ]] && LC_ALL=C awk '/^run: / { found = 1; exit } END { exit !found }' "$1"
}

take_over() { # the run begins to train: no result of an earlier one stays under its name, even if this one is killed
    kill -0 "$$" 2>/dev/null || return 0 # the wrapper is gone, and another one may be at work here
    retire "$output/${network}_bs"*"_${RANK_SIZE}p_$CASE.log" \
        "$output/train_${network}_bs"*"_${RANK_SIZE}p_${CASE}_loss.txt" &&
        if [[ ! $log -ef $run_log ]]; then retire "$log" && share "$run_log" "$log"; fi
}

try_lock() {
    if command -v flock >/dev/null; then
        flock -n 9 || (($? != 1)) # 1: held by another; else: a file system without locks
    else
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null
    fi
}

run_training() {
    local pipes tee_pid start tee_status
    signals=0 interrupted=0 train_pid=''

    if ! { pipes=$(mktemp -d) && mkfifo -- "$pipes/pipe"; } 2>/dev/null; then
        fail 5 "error[io]: cannot make a pipe; ${TMPDIR:-/tmp}; free space there or set TMPDIR"
    fi
    # It ends when the run has closed the pipe, not on a signal: the last lines of an interrupted run count most.
    (trap '' INT TERM HUP && copy_output) <"$pipes/pipe" 9>&- &
    tee_pid=$!
    exec 7>"$pipes/pipe"
    rm -rf -- "$pipes"
    if [[ -n $note ]]; then printf '%s\n' "$note" >&7; fi

    trap 'interrupt 130' INT
    trap 'interrupt 143' TERM
    trap 'interrupt 129' HUP
    SECONDS=0
    start=0
    while :; do
        run_once
        if ((interrupted || start == restarts)) || ! may_start_again "$run_status"; then break; fi
        start=$((start + 1))
        printf 'note: restart %s of %s, because the run ended with exit code %s\n' "$start" "$restarts" "$run_status" >&7
        options=("${again[@]}")
        export TORCHELASTIC_RESTART_COUNT=$start # the newest state counts, and not that of a --resume=FILE
    done
    seconds=$SECONDS
    exec 7>&-
    wait_for "$tee_pid"
    tee_status=$status
    trap '' INT TERM HUP # what is left takes no time and is not to be left half done
    if began "$run_log"; then share "$run_log" "$log"; fi

    if ((interrupted)); then run_status=$interrupted; fi
    if ((run_status)); then fail_as_the_run "$run_status"; fi
    if ((tee_status)); then
        fail 5 "error[io]: the log is not whole: it ended with $tee_status; $run_log; is the disk full, or does nobody read this output any more?"
    fi
}

copy_output() { # standard input to the screen and to the log
    local line LC_ALL=C
    while IFS= read -r line; do
        printf '%s\n' "$line" 2>/dev/null || exit 1
        if ! printf '%s\n' "$line" 2>/dev/null >>"$run_log"; then
            cat
            exit 1
        fi
        if [[ $line == 'run: '* ]]; then
            take_over
            exec tee -a -- "$run_log"
        fi
    done
    printf %s "$line" | tee -a -- "$run_log"
}

run_once() { # sets run_status
    # Job control, because without it a shell starts what runs in the background with Ctrl-C ignored.
    set -m
    "$python" "${options[@]}" </dev/null >&7 2>&1 7>&- 9>&- &
    train_pid=$!
    set +m
    if ((interrupted)); then interrupt "$interrupted"; fi # it came before there was anything to stop

    # Whoever reads descriptor 8 and sees it close without a line knows that this shell was killed, and ends the run.
    exec 8> >(exec 7>&- 9>&- >/dev/null 2>&1 && trap '' INT TERM HUP && { read -r || kill -TERM "$train_pid"; })

    wait_for "$train_pid"
    run_status=$status
    train_pid=''
    printf '\n' >&8
    exec 8>&-
}

may_start_again() { # exit code: a process of the run has died or hung, or the run itself was killed
    (($1 == 6 || ($1 > 128 && $1 != 130 && $1 != 143)))
}

fail_as_the_run() { # exit code
    local reason how=''
    reason=$(LC_ALL=C awk '
        /^note: restart / { error = ""; last = "" }
        /^error\[/ { error = $0 }
        NF { last = $0 }
        END { print (error != "" ? error : last) }' "$run_log")
    if ((interrupted)); then
        how=interrupted
    elif (($1 > 128)) && [[ $reason != error\[* ]]; then
        how="ended by signal $(($1 - 128))"
        if (($1 == 137)); then how+=' (perhaps out of memory)'; fi
        if [[ $KIND == full ]] && began "$run_log"; then how+='; to go on, add --resume=auto to the command'; fi
    fi
    if [[ -n $how ]]; then reason="$how${reason:+; the last line was: $reason}"; fi
    printf '%s: train_8p.py failed with exit code %s; the whole run: %s\n' "$name" "$1" "$(quoted "$run_log")" >&2
    fail "$1" "${reason:-train_8p.py printed nothing}"
}

interrupt() { # the wrapper's exit code
    signals=$((signals + 1))
    interrupted=$1
    if [[ -z $train_pid ]]; then return; fi
    if ((interrupted == 130)); then
        kill -INT -- "-$train_pid" 2>/dev/null || true # the whole group, as a terminal's Ctrl-C does
    else
        kill -TERM "$train_pid" 2>/dev/null || true # it ends its ranks, in order
    fi
}

wait_for() { # pid; sets status
    local seen=-1
    while ((signals != seen)); do # a signal cuts a wait short
        seen=$signals
        status=0
        wait "$1" 2>/dev/null || status=$?
    done
}

write_results() {
    "$python" "$here/result.py" "--kind=$KIND" "--ranks=$RANK_SIZE" "--network=$network" "--seconds=$seconds" \
        "--log=$run_log" "--output=$output" "--folder=$folder" "--record=${record:-$folder}" \
        ${arg_accept_bleu:+"--accept=$arg_accept_bleu"}
}
