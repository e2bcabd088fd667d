#!/usr/bin/env bash
# The VMs of a TPU pod, a process each: configs/launch/tpu_vms.sh NAME ZONE CONFIG [options of train]
# JAX finds its place in the metadata of the VMs, on which shardlab[tpu] is installed; ~/runs is a folder that all of
# them see. Where one is gone JAX ends the others within two minutes; the same command goes on from the last checkpoint.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  shardlab train ${*@Q} --out ~/runs/$name --checkpoint-every 500 --resume --distributed"
