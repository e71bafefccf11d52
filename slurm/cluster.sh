#!/usr/bin/env bash
# A real Slurm cluster on this one machine, for tests: munged, slurmctld and several slurmd on the loopback interface.
# No systemd, no cgroups, no root needed; all its state in one directory. Debian and Ubuntu: slurmctld slurmd
# slurm-client munge.
#
#   cluster.sh start              start (does nothing when it is up), wait until all nodes are idle
#   cluster.sh stop               cancel jobs, stop everything, remove its state
#   cluster.sh status             exit 0 when the controller is up and all nodes are idle or busy
#   cluster.sh env                print "export SLURM_CONF=..." for eval
#   cluster.sh reset              cancel jobs, bring stopped slurmds back, resume nodes
#   cluster.sh kill-node N [hard] SIGKILL one slurmd ("hard": its jobs too)
#   cluster.sh start-node N       start one slurmd and resume the node
#   cluster.sh restart-ctld       stop slurmctld and start it again
#
# Partitions: cpu (all nodes, default), gpu (the nodes with pretended GPUs), low (all nodes, preempted by the others).
#
# Environment, all optional:
#   SMELT_CLUSTER_DIR           state directory; a short path, for its sockets  (./.slurm-cluster)
#   SMELT_CLUSTER_NODES         number of nodes                                 (4)
#   SMELT_CLUSTER_CPUS          CPUs that each claims                           (2)
#   SMELT_CLUSTER_MEM           MB that each claims                             (8000)
#   SMELT_CLUSTER_GPU_NODES     the first so many nodes have GPUs               (2)
#   SMELT_CLUSTER_GPUS          pretended GPUs on each of them                  (2)
#   SMELT_CLUSTER_AUTH          munge | none                                    (munge)
#   SMELT_CLUSTER_UTS           1: each node has its own host name, 0: not      (1 where namespaces allow it)
#                               Without it Open MPI ranks on one node crash: set OMPI_MCA_btl=self,tcp.
#   SMELT_CLUSTER_NODE_TIMEOUT  SlurmdTimeout, s                                (10)
#   SMELT_CLUSTER_KILL_WAIT     KillWait, s                                     (2)
#   SMELT_CLUSTER_GRACE         GraceTime of partition low, s; 0: no warning    (10)
#   SMELT_CLUSTER_CRED_EXPIRE   wait of a requeued job after a node failure, s  (5)
#   SMELT_CLUSTER_WAIT          longest wait for idle nodes, s                  (60)
#   SMELT_CLUSTER_KEEP          1: stop keeps the logs                          (0)
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${SMELT_CLUSTER_DIR:=$PWD/.slurm-cluster}" || exit 1
D=$(cd "$SMELT_CLUSTER_DIR" && pwd -P)
# Sockets lie below this directory and their paths must stay under 108 characters.
[ ${#D} -le 60 ] || { echo "cluster: SMELT_CLUSTER_DIR too long (${#D} > 60): $D" >&2; exit 1; }
# "stop" removes folders below this directory, so it must be one that "start" made
# or found empty.
OURS="$D/.smelt-cluster"
if [ ! -e "$OURS" ]; then
  [ "$D" != / ] && [ -z "$(ls -A "$D")" ] || { echo "cluster: $D is not empty and not a cluster directory" >&2; exit 1; }
fi
# A running cluster keeps the settings that it was started with.
[ -s "$D/etc/settings" ] && . "$D/etc/settings"
N=${SMELT_CLUSTER_NODES:-4} CPUS=${SMELT_CLUSTER_CPUS:-2} MEM=${SMELT_CLUSTER_MEM:-8000}
GN=${SMELT_CLUSTER_GPU_NODES:-2} GPUS=${SMELT_CLUSTER_GPUS:-2}
AUTH=${SMELT_CLUSTER_AUTH:-munge}
NS=(unshare --uts --mount); [ "$(id -u)" = 0 ] || NS=(unshare --user --map-current-user --keep-caps --uts --mount)
UTS=${SMELT_CLUSTER_UTS:-}
if [ -z "$UTS" ]; then
  if "${NS[@]}" sh -c 'hostname node0 && mount --bind /etc/hosts /etc/hosts' 2>/dev/null; then UTS=1; else UTS=0; fi
fi
WAIT=${SMELT_CLUSTER_WAIT:-60} CRED=${SMELT_CLUSTER_CRED_EXPIRE:-5}
ME=$(id -un)
export PATH="$PATH:/usr/sbin:/sbin"
export SLURM_CONF="$D/etc/slurm.conf"
# Variables of an enclosing Slurm job would change what the tools below do.
for v in $(compgen -e | grep -E '^(SLURM_|SBATCH_|SRUN_|SQUEUE_|SINFO_)' |
           grep -vE '^SLURM_(LAB_|CONF$)'); do unset "$v"; done

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
now() { date +%s.%N; }

alive() { [ -n "${1:-}" ] && kill -0 "$1" 2>/dev/null && ! grep -q '^State:.*Z' "/proc/$1/status" 2>/dev/null; }
pid_of() { local p; p=$(cat "$D/run/$1.pid" 2>/dev/null) && alive "$p" && echo "$p"; }

# End one process by pid: TERM, wait, KILL.
end() {
  local p=$1 i
  alive "$p" || return 0
  kill "$p" 2>/dev/null
  for i in $(seq 1 "${2:-50}"); do alive "$p" || return 0; sleep 0.1; done
  kill -KILL "$p" 2>/dev/null
  for i in $(seq 1 20); do alive "$p" || return 0; sleep 0.1; done
}

# Pids of step daemons and job processes of THIS cluster: they carry the marker
# that the slurmds were started with, or SLURM_CONF of this cluster plus a job id.
cluster_job_pids() {
  local p e
  for p in /proc/[0-9]*; do
    p=${p#/proc/}
    [ "$p" = "$$" ] && continue
    e=$({ tr '\0' '\n' < "/proc/$p/environ"; } 2>/dev/null) || continue
    case $'\n'"$e"$'\n' in
      *$'\n'"SLURM_CONF=$SLURM_CONF"$'\n'*)
        case $'\n'"$e" in *$'\n'SLURM_JOB_ID=*|*$'\n'SMELT_CLUSTER_MARK=*) echo "$p";; esac;;
    esac
  done
}
cluster_stepd_pids() {   # slurmstepd overwrites its environ: find it by its open log file
  local p l
  for p in /proc/[0-9]*; do
    [ "$(cat "$p/comm" 2>/dev/null)" = slurmstepd ] || continue
    for l in "$p"/fd/*; do
      case $(readlink "$l" 2>/dev/null) in "${1:-$D/log/slurmd.}"*) echo "${p#/proc/}"; break;; esac
    done
  done
}

free_port_block() {   # first block of $1 consecutive free TCP ports
  python3 - "$1" <<'PY'
import os, random, socket, sys
n = int(sys.argv[1]); r = random.Random(os.getpid())
for _ in range(500):
    b = r.randrange(20000, 31000); held = []
    try:
        for i in range(n):
            s = socket.socket(); s.bind(("127.0.0.1", b + i)); held.append(s)
        print(b); break
    except OSError:
        pass
    finally:
        for s in held: s.close()
else:
    sys.exit("no free port block")
PY
}

node_list() { if [ "$1" -eq 1 ]; then echo node1; else echo "node[1-$1]"; fi; }

write_conf() {
  local base i nodes='' g acct info='' authtype credtype
  mkdir -p "$D"/{etc,run,log,state,spool,dev,tmp} && chmod 755 "$D" "$D"/{etc,run,log,spool} && chmod 700 "$D/state"
  base=${SMELT_CLUSTER_PORT_BASE:-$(free_port_block $((N + 3)))} || die "no free ports"
  for i in $(seq 1 "$N"); do
    g=''; if [ "$i" -le "$GN" ] && [ "$GPUS" -gt 0 ]; then g=" Gres=gpu:$GPUS Weight=10"; fi
    nodes+="NodeName=node$i NodeHostname=@NH@$i NodeAddr=127.0.0.1 Port=$((base + 2 + i))$g"$'\n'
    mkdir -p "$D/spool/node$i" "$D/tmp/node$i"
  done
  if [ "$UTS" = 1 ]; then nodes=${nodes//@NH@/node}; else nodes=$(sed -E "s/@NH@[0-9]+/$(hostname -s)/" <<<"$nodes"); fi
  if [ "$AUTH" = munge ]; then
    authtype=auth/munge credtype=cred/munge info="AuthInfo=socket=$D/run/munge.socket,cred_expire=$CRED"
    [ -s "$D/etc/munge.key" ] || (umask 077; head -c 128 /dev/urandom > "$D/etc/munge.key")
  else
    authtype=auth/none credtype=cred/none info="AuthInfo=cred_expire=$CRED"
  fi
  # Without slurmdbd there is no sacct; this text file has one line per job.
  acct="JobCompType=jobcomp/filetxt"$'\n'"JobCompLoc=$D/log/jobcomp.txt"$'\n'
  acct+="AccountingStorageType=accounting_storage/none"
  GPUN=$(node_list "$GN"); [ "$GN" -gt 0 ] || GPUN=node1
  T=$(< "$here/cluster/slurm.conf.in")
  T=${T//@CLUSTER@/smelt}; T=${T//@HOST@/$(hostname -s)}; T=${T//@CTLD_PORT@/$base}
  T=${T//@USER@/$ME}; T=${T//@AUTH_TYPE@/$authtype}; T=${T//@CRED_TYPE@/$credtype}
  T=${T//@AUTH_INFO@/$info}; T=${T//@DIR@/$D}
  T=${T//@SLURMD_TIMEOUT@/${SMELT_CLUSTER_NODE_TIMEOUT:-10}}; T=${T//@KILL_WAIT@/${SMELT_CLUSTER_KILL_WAIT:-2}}
  T=${T//@GRACE@/${SMELT_CLUSTER_GRACE:-10}}; T=${T//@CPUS@/$CPUS}; T=${T//@MEM@/$MEM}
  T=${T//@NODES@/$nodes}; T=${T//@ALL_NODES@/$(node_list "$N")}; T=${T//@GPU_NODES@/$GPUN}
  T=${T//@ACCOUNTING@/$acct}
  printf '%s\n' "$T" > "$D/etc/slurm.conf"
  : > "$D/etc/gres.conf"
  if [ "$GN" -gt 0 ] && [ "$GPUS" -gt 0 ]; then
    for i in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$D/dev/fakegpu$i"; done
    G=$(< "$here/cluster/gres.conf.in")
    G=${G//@GPU_NODES@/$(node_list "$GN")}; G=${G//@DIR@/$D}; G=${G//@LAST@/$((GPUS - 1))}
    printf '%s\n' "$G" > "$D/etc/gres.conf"
  fi
  { echo "127.0.0.1 localhost $(hostname -s) $(hostname)"; for i in $(seq 1 "$N"); do echo "127.0.0.1 node$i"; done; } > "$D/etc/hosts"
  # From 23.11 slurmd loads a cgroup plugin even with task/none, unless told not to.
  if [ "$(slurmd -V | awk '{split($2, v, "."); print (v[1] * 100 + v[2] >= 2311)}')" = 1 ]; then
    printf 'CgroupPlugin=disabled\n' > "$D/etc/cgroup.conf"
  fi
  printf '%s\n' "$base" > "$D/etc/port_base"
  printf 'SMELT_CLUSTER_%s\n' "NODES=$N" "CPUS=$CPUS" "MEM=$MEM" "GPU_NODES=$GN" "GPUS=$GPUS" "AUTH=$AUTH" \
    "UTS=$UTS" > "$D/etc/settings"
}

start_munge() {
  [ "$AUTH" = munge ] || return 0
  [ -n "$(pid_of munged)" ] && return 0
  rm -f "$D/run/munge.socket"*
  # --force: a directory above that is group-writable becomes a warning.
  munged --force --socket="$D/run/munge.socket" --key-file="$D/etc/munge.key" \
    --pid-file="$D/run/munged.pid" --seed-file="$D/run/munged.seed" \
    --log-file="$D/log/munged.log" 2>>"$D/log/munged.err" || { cat "$D/log/munged.err" >&2; die "munged failed"; }
  munge -S "$D/run/munge.socket" -n 2>/dev/null | unmunge -S "$D/run/munge.socket" >/dev/null || die "munge does not answer"
}

start_ctld() {
  local i
  [ -n "$(pid_of slurmctld)" ] && return 0
  rm -f "$D/run/slurmctld.pid"
  SMELT_CLUSTER_MARK=$D slurmctld >>"$D/log/slurmctld.out" 2>&1 </dev/null || { tail -n 5 "$D/log/slurmctld.out" >&2; tail -n 5 "$D/log/slurmctld.log" >&2; die "slurmctld failed"; }
  # A slurmd that registers before slurmctld listens waits seconds to try again.
  for i in $(seq 1 200); do timeout 5 scontrol ping 2>/dev/null | grep -q ' UP' && return 0; sleep 0.1; done
  die "slurmctld does not answer"
}

start_slurmd() {
  local n=$1
  [ -n "$(pid_of "slurmd.$n")" ] && return 0
  rm -f "$D/run/slurmd.$n.pid"
  if [ "$UTS" = 1 ]; then
    # Own host name, and a hosts file that knows all nodes, seen by this node only.
    SMELT_CLUSTER_MARK=$D "${NS[@]}" sh -c \
      'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -N "$1"' - "$n" "$D/etc/hosts" >>"$D/log/slurmd.$n.out" 2>&1 </dev/null
  else
    SMELT_CLUSTER_MARK=$D slurmd -N "$n" >>"$D/log/slurmd.$n.out" 2>&1 </dev/null
  fi || { tail -n 5 "$D/log/slurmd.$n.out" >&2; die "slurmd $n failed"; }
}

start_slurmds() {
  local i pids=()
  for i in $(seq 1 "$N"); do start_slurmd "node$i" & pids+=($!); done
  wait "${pids[@]}"
}

nodes_ready() { # all nodes idle, or busy with jobs; none down, unknown or not responding
  local s; s=$(timeout 10 sinfo -h -N -o '%N %T' 2>/dev/null | sort -u) || return 1
  [ "$(awk '$2 ~ /^(idle|mixed|allocated|completing)$/' <<<"$s" | wc -l)" -eq "$N" ]
}

wait_ready() {
  local end=$((SECONDS + WAIT))
  until nodes_ready; do
    [ "$SECONDS" -lt "$end" ] || { sinfo -N -l >&2; sinfo -R >&2; return 1; }
    sleep 0.2
  done
}

cmd_start() {
  local t0 i; t0=$(now)
  if [ -n "$(pid_of slurmctld)" ] && nodes_ready; then say "already up: $SLURM_CONF"; return 0; fi
  for i in slurmctld slurmd srun python3; do command -v "$i" >/dev/null || die "$i not found"; done
  [ "$AUTH" = munge ] && { command -v munged >/dev/null || die "munged not found"; }
  : > "$OURS"; exec 9>"$D/.lock"; flock -w 60 9 || die "another start is under way"
  [ -s "$D/etc/slurm.conf" ] && [ -n "$(pid_of slurmctld)" ] || { cmd_stop_quiet; write_conf; }
  { start_munge && start_ctld && start_slurmds; } 9>&-
  wait_ready || die "nodes not idle after ${WAIT}s, see $D/log"
  exec 9>&-
  say "up in $(echo "$(now) $t0" | awk '{printf "%.1f", $1-$2}')s: $N nodes, SLURM_CONF=$SLURM_CONF"
}

cmd_stop_quiet() {
  local p i
  if [ -n "$(pid_of slurmctld)" ]; then
    timeout 10 scancel --full --signal=KILL --state=RUNNING --user="$ME" >/dev/null 2>&1
    timeout 10 scancel --user="$ME" >/dev/null 2>&1
    for i in $(seq 1 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for p in "$D"/run/slurmd.*.pid "$D/run/slurmctld.pid"; do
    [ -s "$p" ] && end "$(cat "$p")" 100
  done
  for p in $(cluster_stepd_pids) $(cluster_job_pids); do end "$p" 5; done
  [ -s "$D/run/munged.pid" ] && end "$(cat "$D/run/munged.pid")"
  [ -e "$OURS" ] && (cd "$D" && rm -rf run state spool dev etc tmp)
  return 0
}

cmd_stop() {
  cmd_stop_quiet
  if [ "${SMELT_CLUSTER_KEEP:-0}" = 1 ]; then say "stopped, logs in $D/log"
  elif [ -e "$OURS" ]; then (cd "$D" && rm -rf log .lock .smelt-cluster); rmdir "$D" 2>/dev/null; say "stopped, $D cleared"
  else rmdir "$D" 2>/dev/null; say "nothing to stop"; fi
}

cmd_reset() {
  local i
  timeout 10 scancel --user="$ME" >/dev/null 2>&1
  start_munge; start_ctld
  start_slurmds
  for i in $(timeout 10 sinfo -h -N -o '%N %T' | awk '$2 !~ /^(idle|mixed|allocated|completing)$/ {print $1}' | sort -u); do
    scontrol update nodename="$i" state=resume 2>/dev/null
  done
  wait_ready || die "reset: nodes not idle"
  for i in $(seq 1 100); do [ -z "$(squeue -h)" ] && break; sleep 0.1; done
}

cmd_kill_node() {
  local n=$1 p s; p=$(pid_of "slurmd.$n") || die "slurmd $n is not running"
  kill -KILL "$p"
  if [ "${2:-}" = hard ]; then   # the machine is gone: its steps and processes too
    for s in $(cluster_stepd_pids "$D/log/slurmd.$n.log"); do
      kill -STOP "$s" 2>/dev/null  # it would tell the controller that its processes have ended
      kill -KILL "$s" $(descendants "$s") 2>/dev/null
    done
  fi
  rm -f "$D/run/slurmd.$n.pid"
}
descendants() { local c; for c in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do descendants "$c"; echo "$c"; done; }

case "${1:-}" in
  start) cmd_start;;
  stop) cmd_stop;;
  status) [ -n "$(pid_of slurmctld)" ] && nodes_ready && sinfo;;
  env) echo "export SLURM_CONF='$SLURM_CONF'";;
  reset) cmd_reset;;
  kill-node) cmd_kill_node "${2:?node}" "${3:-}";;
  start-node) start_slurmd "${2:?node}"; sleep 1; scontrol update nodename="$2" state=resume 2>/dev/null; wait_ready;;
  restart-ctld)
    p=$(pid_of slurmctld) && end "$p" 100
    start_ctld; wait_ready;;
  *) sed -n '2,34p' "${BASH_SOURCE[0]}"; exit 2;;
esac
