# What a job needs to find smelt; sourced by the job scripts beside this file, on the node.
#
#   SMELT_HOME     the checkout; where sbatch was called if not set
#   SMELT_ENV      the Python environment; SMELT_HOME/.venv if not set
#   SMELT_MODULES  modules to load, separated by blanks
#
# shellcheck shell=bash

: "${SMELT_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"
: "${SMELT_ENV:=$SMELT_HOME/.venv}"
for module in ${SMELT_MODULES:-}; do module load "$module"; done
export PATH="$SMELT_ENV/bin:$PATH"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
command -v smelt >/dev/null || {
  echo "env.sh: no smelt in $SMELT_ENV/bin: call sbatch in the checkout, or set SMELT_HOME or SMELT_ENV" >&2
  exit 2
}
