"""A SLURM of real daemons on three hosts: ``h1`` has the controller and is where jobs are submitted, two are nodes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.cluster.hosts import Hosts, tail, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIG = """
ClusterName=test
SlurmctldHost=h1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job may start again only when its old credentials have run out: minutes elsewhere.
AuthInfo=cred_expire=5
StateSaveLocation=FOLDER/state
SlurmdSpoolDir=FOLDER/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=FOLDER/slurmctld.log
SlurmdLogFile=FOLDER/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=20
SlurmdParameters=config_overrides
# The newer spelling is PreemptParameters=send_user_signal.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=h2 NodeAddr=10.77.0.2 CPUs=4 RealMemory=8000 Gres=gpu:1
NodeName=h3 NodeAddr=10.77.0.3 CPUs=4 RealMemory=8000 Gres=gpu:1
PartitionName=low Nodes=h2,h3 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=h2,h3 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """``folder``: of everything that its daemons write."""

    def __init__(self, folder: Path) -> None:
        self.folder, config = folder, folder / "slurm.conf"
        (folder / "state").mkdir(parents=True)
        config.write_text(CONFIG.replace("FOLDER", str(folder)))
        # Something to count as a GPU, so that asking for one is tested.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = folder / "munge.key"
        key.write_bytes(b"not a secret: a network of three namespaces" * 2)
        key.chmod(0o400)
        self.hosts = Hosts(folder, 3, {"SLURM_CONF": str(config)})
        try:
            for name in self.hosts.names:
                self.start_daemons(name)
            wait_until(self.is_up, 300, lambda: self.run("sinfo") + tail(folder / "slurmctld.log"))
        except BaseException:
            self.hosts.close()
            raise

    def start_daemons(self, name: str) -> None:
        """After a boot."""
        run = "/run/munge"
        files = [f"--{kind}-file={run}/munged.{kind}" for kind in ("pid", "log", "seed")]
        self.hosts.run(name, "mkdir", "-p", run)
        self.hosts.run(name, "munged", f"--key-file={self.folder}/munge.key", *files)
        self.hosts.run(name, "slurmctld" if name == "h1" else "slurmd")

    def is_up(self) -> bool:
        return self.run("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D").strip() == "2"

    def close(self) -> None:
        self.hosts.close()

    def run(self, *command: str | Path, timeout_s: float = 300, check: bool = True) -> str:
        """On the host where jobs are submitted."""
        return self.hosts.run("h1", *command, timeout_s=timeout_s, check=check)

    def show(self, job: str) -> dict[str, str]:
        """SLURM's account of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job, check=False)))

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "")

    def cancel_all(self) -> None:
        """Between tests: no job, and both nodes free."""
        self.run("scancel", "--user=root", check=False)
        wait_until(self.is_up, 300, lambda: self.run("squeue") + self.run("sinfo"))

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        return self.hosts.start("h1", *command)
