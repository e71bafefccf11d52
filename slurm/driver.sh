# The driver of a campaign as what a job does; sourced by driver.sbatch and allocation.sbatch, after env.sh, with the
# arguments of `smelt run`.
#
# On USR1, which Slurm sends before the time is over, it stops the campaign, and queues the job again to go on with it.
# Every other end is the job's end, with the exit code of smelt.
#
# shellcheck shell=bash

again=no
smelt run "$@" &
driver=$!
trap 'again=yes signalled=yes; kill -TERM $driver' USR1
trap 'signalled=yes; kill -TERM $driver 2>/dev/null' TERM

# A trapped signal ends `wait` before the driver has ended.
signalled=yes
while [ $signalled = yes ]; do
  signalled=no
  wait $driver
  code=$?
done

# 143: before it had begun.
if [ $again = yes ] && { [ $code -eq 130 ] || [ $code -eq 143 ]; }; then
  echo "driver.sh: the time is nearly over, queueing again"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until Slurm ends this run
fi
exit $code
