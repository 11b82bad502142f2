#!/bin/bash
# The end of a batch script: srun's exit code in, that of the job out; where it helps, the job is queued again first.
#   after.sh CODE FILES MAX_RESTARTS
# FILES is the prefix of the job's notes: FILES.code, FILES.again and FILES.start are the ranks'
# (clipdist/fault_tolerance/slurm.py), FILES.faults has a line for every restart after a fault, FILES.vain one for every warned
# start in a row that brought no new checkpoint.
# 0 done, 2 bad input: never again. 75 interrupted with a checkpoint: again where Slurm gave the warning or preempts the
# job; a start that is warned before it has a new checkpoint would be so for ever, and comes again up to MAX_RESTARTS
# times in a row. All else is a fault, and the job starts again up to MAX_RESTARTS times. Nothing else counts.
code=$1 files=$2 most=$3
# Not by SLURM_JOB_ID alone: one element of an array has the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}
early=

# Whether this start of the job brought a checkpoint. In doubt (no note: a full disk) it did.
progress() {
    [ -z "$early" ] || return 1
    [ -s "$files.start" ] || return 0
    local run before newest='' manifest
    { IFS= read -r run && IFS= read -r before; } <"$files.start"
    for manifest in "$run"/checkpoints/step-*/manifest.json; do
        [ ! -e "$manifest" ] || newest=$manifest
    done
    [ "$newest" != "$before" ]
}

[ ! -s "$files.code" ] || read -r code <"$files.code"
# A rank that was warned (SIGUSR1, SIGUSR2) before training had begun ends by the signal itself: nothing is lost.
[ "$code" != 138 ] && [ "$code" != 140 ] || { code=75 early=1; : >"$files.again"; }
[ "$code" != 0 ] && [ "$code" != 2 ] || exit "$code"

state=$(scontrol show job --oneliner "$job")
# A job that a user cancels, or whose time is up, is RUNNING no more: requeue would bring it back.
[[ $state == *" JobState=RUNNING "* ]] || exit "$code"
if [ "$code" = 75 ]; then
    preempted=
    [[ ! $state =~ \ PreemptTime=[0-9] ]] || preempted=1
    [ -e "$files.again" ] || [ "$preempted" ] || exit 75
    if progress; then
        rm -f "$files.vain"
    elif [ -z "$preempted" ]; then # how often others preempt it is not the job's fault
        vain=$(wc -l 2>/dev/null <"$files.vain" || echo 0)
        if ((vain >= most)); then
            echo 1 >"$files.code"
            echo "fault (no new checkpoint): job $job was warned of its end $((vain + 1)) times in a row before it had" \
                "one; the job ends. Raise launch.time_min, or lower launch.signal_s" >&2
            exit 1
        fi
        date +%FT%T >>"$files.vain"
    fi
    echo "interrupted with a checkpoint: job $job is queued again"
else
    faults=$(wc -l 2>/dev/null <"$files.faults" || echo 0)
    if ((faults >= most)); then
        echo "fault (exit code $code): $faults of $most restarts are used up; the job ends" >&2
        exit "$code"
    fi
    echo "$(date +%FT%T) exit code $code" >>"$files.faults"
    echo "fault (exit code $code): job $job starts again, restart $((faults + 1)) of $most" >&2
fi
scontrol requeue "$job"
exit "$code"
