#!/usr/bin/env bash
# Train a stage on several machines under SLURM, and go on by itself when its time is up:
#   sbatch docs/examples/slurm.sh --stage rho1 --config stage_configs/rho1.toml
# Everything behind the script goes to `wmtp-ds train`. Submit it in the folder that the config's paths start from, on a
# file system that all machines share.
#SBATCH --job-name=wmtp-ds
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=wmtp-ds-%j.log
# Five minutes before the time is up, this script gets SIGUSR1 (B: it alone) and passes it on: the ranks save and leave.
# A step and a checkpoint must fit into that.
#SBATCH --signal=B:USR1@300
set -u

# source /shared/wmtp-ds/.venv/bin/activate    # if this shell did not have it when the job was submitted

# This script runs on the first machine of the allocation: what is free here is free where the ranks meet.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER=$first PORT=$port

# One task a machine: each starts the ranks of its machine. If one fails, srun ends the others.
# shellcheck disable=SC2016  # SLURM_NODEID is another one in each task
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'exec wmtp-ds train "$@" --resume auto \
  --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --master_addr "$MASTER" --master_port "$PORT"' \
  wmtp-ds "$@" &
step=$!

time_is_up=
woken=
code=1
trap 'time_is_up=1; woken=1; kill -USR1 "$step"' USR1
trap 'woken=1' TERM # scancel: SLURM tells the ranks itself, and they, too, save and leave
while :; do
  woken=
  wait "$step"
  status=$?
  [ "$status" -eq 127 ] || code=$status # 127: it was waited for already
  [ -n "$woken" ] || break              # or else a signal has ended the wait, not the step
done

if [ -n "$time_is_up" ] && [ "$code" -eq 143 ]; then
  echo "time is up: everything is saved; job $SLURM_JOB_ID goes back into the queue and goes on from there"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
