# shellcheck shell=bash
# Sourced by the batch scripts beside it: how the ranks of a job are started, told to save, and started again.
#
#   CODE      whose launcher/ is run: a checkout or a snapshot of one (default: the folder where sbatch was called)
#   PYTHON    what runs Python there, in the shell's words (default: python): "apptainer exec --nv sws-dist.sif python",
#             or "'/my venv/bin/python'"
#   RESTARTS  how often a job that lost a rank is started again (default: 3); one that was told to stop always is.
#             Its losses are counted in .lost-ranks-JOB, in the folder where sbatch was called

CODE=$(realpath "${CODE:-.}")
eval "PYTHON=(${PYTHON:-python})"
RESTARTS=${RESTARTS:-3}
AGAIN=75 LOST=69 # sws_dist/errors.py: saved, start again with --resume auto; other ranks are gone
export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
[ -z "${SLURM_CPUS_PER_TASK-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over itself

# SLURM sends USR1 to this shell before the time limit (--signal) and, where it is set up so, before a preemption; the
# shell hands it to srun, and srun to every rank.
step='' told='' woken='' losses=.lost-ranks-$SLURM_JOB_ID
export SWS_FAILED=$PWD/.failed-$SLURM_JOB_ID # a rank that ends with an error makes this file
trap 'told=yes woken=yes; [ -z "$step" ] || kill -USR1 "$step" || true' USR1
trap 'woken=yes' TERM # srun and the ranks get their own; wait for what they do about it

# on_every_rank NAME ARGUMENTS...: run launcher/NAME once for every task of the job. Does not return.
on_every_rank() {
    local code
    srun --kill-on-bad-exit=1 "${PYTHON[@]}" -u "$CODE/launcher/$1" "${@:2}" &
    step=$!
    while true; do # a signal ends wait, but not srun
        woken='' code=0
        wait "$step" || code=$?
        [ -n "$woken" ] || break
    done
    # A rank that fails before the others have begun has srun tell them to stop, and theirs is the higher code.
    [ -n "$told" ] || [ "$code" != $AGAIN ] || [ ! -e "$SWS_FAILED" ] || code=1
    rm -f "$SWS_FAILED"
    # The first rank that leaves may have srun kill one that is about to, whose code is then the higher one.
    if [ "$code" = $AGAIN ] || { [ -n "$told" ] && [ "$code" -gt 128 ]; }; then
        start_again "told to stop (exit code $code)"
    elif [ "$code" = $LOST ] || [ "$code" -gt 128 ]; then
        echo "exit code $code, $(date)" >>"$losses"
        if [ "$(wc -l <"$losses")" -le "$RESTARTS" ]; then
            start_again "a rank was lost (exit code $code)"
        else
            echo "a rank was lost (exit code $code), and RESTARTS=$RESTARTS times before: the job ends"
        fi
    fi
    rm -f "$losses"
    exit "$code"
}

# start_again REASON: back into the queue, unless the job was cancelled or SLURM requeues it itself.
start_again() {
    # An element of an array by its own name: one of them bears the whole array's number.
    local job=$SLURM_JOB_ID state
    [ -z "${SLURM_ARRAY_JOB_ID-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || true
    if [ "$state" = RUNNING ]; then
        echo "job $job: $1; it goes back into the queue"
        patiently scontrol requeue "$job" && exit 0
    fi
    echo "job $job: $1; SLURM calls it ${state:-unknown}, and it does not go back into the queue by itself"
}

# patiently COMMAND...: SLURM's controller may be busy, so try for half a minute.
patiently() {
    local try
    for try in 1 2 3 4 5 6; do
        "$@" && return
        sleep 5
    done
    return 1
}
