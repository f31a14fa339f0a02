#!/bin/bash
@HEADER@
# --signal above: Slurm warns every rank that long before the time limit, and before a preemption;
# they save together and leave with @STOPPED@. No "B:" there: that would warn this script alone.
set -u
cd @FOLDER@
# What ranks need and Slurm does not know; --export=ALL hands it and your own shell's on.
@ENVIRONMENT@

# One line a job; an array job picks its own.
run() {
  case "${SLURM_ARRAY_TASK_ID:-0}" in
@CASES@
    *) echo "no job number ${SLURM_ARRAY_TASK_ID:-0}" >&2; return 2 ;;
  esac
}

# A job of a queue that ended well is not done again.
@BEFORE@

# A crash starts again in this allocation, a limited number of times; each start resumes from the last
# whole checkpoint. 0 is done, 2 a wrong command, @STOPPED@ a stop that saved: no crashes.
left=@RESTARTS@
while true; do
  run
  code=$?
  case "$code" in 0|2|@STOPPED@) break ;; esac
  [ "$left" -gt 0 ] || break
  left=$((left - 1))
  echo "exit code $code; starting again ($left restarts left)" >&2
done
@AFTER@
# Stopped with a checkpoint saved: queue the job again, and it goes on from there.
if [ "$code" -eq @STOPPED@ ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
