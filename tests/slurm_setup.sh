#!/bin/bash
# Installs what the tests of `make test-slurm` need, Debian's slurm-wlm and munge, unless they are there.
set -eu
PATH=$PATH:/usr/sbin:/usr/local/sbin
missing=
for program in munged slurmctld slurmd sbatch srun scontrol squeue scancel; do
    command -v $program > /dev/null || missing="$missing $program"
done
if [ "$(id -u)" != 0 ]; then
    echo "test-slurm: needs root, to run the daemons of a SLURM cluster (in a container: docker run ... make test-slurm)" >&2
    exit 1
fi
[ -n "$missing" ] || exit 0
if ! command -v apt-get > /dev/null; then
    echo "test-slurm: not installed:$missing; there is no apt-get here to install slurm-wlm and munge with" >&2
    exit 1
fi
# The packages would start daemons of their own
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge
