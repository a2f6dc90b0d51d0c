#!/usr/bin/env bash
# Train a stage on the machines of a hostfile, over ssh (pdsh), or go on with it:
#   HOSTFILE=docs/examples/hostfile docs/examples/hostfile.sh --stage rho1 --config stage_configs/rho1.toml
# Everything behind the script goes to bin/train_stage.py. Run it on the first machine of the hostfile, in the checkout;
# all machines see the same folders (also Python's) under the same names, and ssh asks for no password.
set -eu
hostfile=${HOSTFILE:-docs/examples/hostfile}

# Where the ranks meet: the first machine of the hostfile, which is this one.
first=$(awk '!/^#/ && NF { print $1; exit }' "$hostfile")
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

# pdsh hands on variables that begin with NCCL, PYTHON or MLFLOW; others go into the file .deepspeed_env, one NAME=value
# a line.
exec deepspeed --hostfile "$hostfile" --master_addr "$first" --master_port "$port" \
  bin/train_stage.py "$@" --resume auto
