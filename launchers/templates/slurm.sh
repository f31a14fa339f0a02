#!/bin/bash
@HEADER@
set -u
cd @FOLDER@
@ENVIRONMENT@

case "${SLURM_ARRAY_TASK_ID:-0}" in
@CASES@
  *) echo "no job number ${SLURM_ARRAY_TASK_ID:-0}" >&2; exit 2 ;;
esac
code=$?
# Stopped by a signal with a checkpoint saved: queue the job again, a limited number of times.
if [ "$code" -eq @STOPPED@ ] && [ "${SLURM_RESTART_COUNT:-0}" -lt @RESTARTS@ ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
