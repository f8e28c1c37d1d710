"""A real SLURM of two nodes on this machine, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "sinfo")


def missing() -> str | None:
    """Why SLURM cannot be started here, if it cannot."""
    if os.geteuid() != 0:
        return "starting SLURM's daemons needs root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(absent)} not found (Debian: slurm-wlm, munge)" if absent else None


class Slurm:
    """slurmctld and two slurmd's, each a node of two CPUs.

    Args:
        folder: For configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname()
        config = f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort=17000
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=600
BatchStartTimeout=60
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=2000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=2000
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""
        for part in ("state", "spool-n0", "spool-n1"):
            (folder / part).mkdir()
        (folder / "slurm.conf").write_text(config)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._start_munge()
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", "n0")
        self._start("slurmd", "-D", "-N", "n1")
        self._await_idle()

    def run(self, *command: object) -> str:
        """Run one of SLURM's commands."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def logs(self) -> str:
        """What the daemons say."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)

    def told(self, job: str) -> str:
        """What SLURM knows of a job, and what the daemons say."""
        return f"{self.run('scontrol', 'show', 'job', job)}\n{self.logs()}"

    def stop(self) -> None:
        """End the daemons and what they run."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:  # noqa: PERF203
                daemon.kill()

    def _start(self, *command: str) -> None:
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _start_munge(self) -> None:
        running = subprocess.run(["munge", "-n"], capture_output=True)
        if running.returncode == 0:
            return
        Path("/var/run/munge").mkdir(parents=True, exist_ok=True)
        shutil.chown("/var/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, capture_output=True)

    def _await_idle(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            shown = subprocess.run(
                ["sinfo", "--noheader", "--format=%t %D"],
                env=self.environment,
                capture_output=True,
                text=True,
            ).stdout
            if shown.split() == ["idle", "2"]:
                return
            assert time.monotonic() < deadline, f"{shown}\n{self.logs()}"
            time.sleep(0.3)
