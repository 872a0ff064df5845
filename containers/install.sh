#!/usr/bin/env bash
# Install what both images hold on Debian 12: the environment that `make` sets up, from the same constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    ca-certificates g++ git make openssh-client pdsh python3-dev python3-venv \
    libibverbs1 ibverbs-providers # NCCL loads them for InfiniBand, and uses TCP without a word where they are missing
rm -rf /var/lib/apt/lists/*
make VENV=/opt/sws-venv /opt/sws-venv/ready
git describe --always --abbrev=12 --dirty=+ >COMMIT # runs in the image say where they come from
