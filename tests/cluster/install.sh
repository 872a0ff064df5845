#!/usr/bin/env bash
# What tests/cluster needs beside Python: a SLURM, ssh, pdsh and tools for namespaces. Debian, as root; else nothing.
set -euo pipefail
missing=()
for program in slurmctld slurmd:slurmd sbatch:slurm-client munged:munge sshd:openssh-server ssh:openssh-client \
    pdsh:pdsh ip:iproute2; do
    command -v "${program%%:*}" >/dev/null || PATH=$PATH:/usr/sbin command -v "${program%%:*}" >/dev/null ||
        missing+=("${program##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/cluster will be skipped: not installed are ${missing[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# The tests start their own daemons, in namespaces of their own; the packages' services stay off.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
