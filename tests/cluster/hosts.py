"""Several hosts on one machine: network, process, mount and host-name namespaces around real daemons.

Each host is one process, the ``init`` of its own process namespace: whatever runs there ends with it, and so do its
network and its mounts. Nothing has a name on the machine outside, no port is taken there, and two groups of hosts do
not meet. File systems are shared, but for /run and /dev/shm.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launching import BIN, REPOSITORY

PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen")
NETWORK = "10.77.0"
SBIN = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))


def require(*programs: str) -> None:
    """Skip where hosts cannot be."""
    if os.geteuid():
        pytest.skip("namespaces need root")
    missing = [program for program in (*PROGRAMS, *programs) if shutil.which(program, path=SBIN) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (tests/cluster/install.sh)")
    trial = "ip link add switch type bridge && ip link add p1 type veth peer name eth0"
    command = ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "bash", "-c", trial]
    tried = subprocess.run(command, env={"PATH": SBIN}, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine does not allow namespaces or virtual networks: {tried.stderr.strip()}")


class Hosts:
    """Hosts ``h1``, ``h2``, ... at 10.77.0.1, ..., joined by a switch; ``folder`` holds their files.

    As Debian does it, each has its own name at 127.0.1.1 in its /etc/hosts.
    """

    def __init__(self, folder: Path, count: int, environment: dict[str, str] | None = None) -> None:
        self.folder, self.names = folder, [f"h{i + 1}" for i in range(count)]
        self.environment = {
            "PATH": os.pathsep.join((str(BIN), SBIN)),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(REPOSITORY)),
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(BIN.parent / "torch_extensions"),
            **(environment or {}),
        }
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._cables = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._write_ssh()
        self._switch = self._unshare("--net", script="ip link add switch type bridge; ip link set switch up")
        for name in self.names:
            self.boot(name)

    # ---- life and death ------------------------------------------------------------------------------------------

    def boot(self, name: str) -> None:
        """Start a host with an ssh daemon."""
        number = self.names.index(name) + 1
        etc = self.folder / f"etc-{name}"
        etc.mkdir(exist_ok=True)
        others = [f"{NETWORK}.{i + 1} {other}\n" for i, other in enumerate(self.names) if other != name]
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n" + "".join(others))
        (etc / "resolv.conf").write_text("")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        script = f"""
            hostname {name}
            for file in hosts resolv.conf nsswitch.conf; do mount --bind {etc}/$file /etc/$file; done
            mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/sshd
            mount -t tmpfs tmpfs /dev/shm
            mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config
            ip link set lo up
        """
        init = self._unshare("--net", "--mount-proc", "--uts", "--ipc", "--mount", script=script)
        self._inits[name] = init
        self._cables += 1
        cable = f"p{self._cables}"
        # The same hardware address after each start, as the others remember it.
        eth0 = f"eth0 address 02:00:00:00:00:{number:02x} netns {self.pid(name)}"
        self._in_switch(f"ip link add {cable} type veth peer name {eth0}")
        self._in_switch(f"ip link set {cable} master switch up alias {name}")
        self.run(name, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        self.run(name, "/usr/sbin/sshd", "-f", f"{self.folder}/sshd_config")

    def crash(self, name: str) -> None:
        """The host is gone at once, with all its processes; its kernel closes their connections."""
        os.kill(self.pid(name), signal.SIGKILL)
        self._inits.pop(name).wait(timeout=300)

    def unplug(self, name: str) -> None:
        """No packet from or to the host arrives any more; its processes go on."""
        self._in_switch(f"ip link set $(ip -o link | sed -n 's/^[0-9]*: \\(p[0-9]*\\)@.*alias {name}$/\\1/p') down")

    def plug(self, name: str) -> None:
        self._in_switch(f"ip link set $(ip -o link | sed -n 's/^[0-9]*: \\(p[0-9]*\\)@.*alias {name}$/\\1/p') up")

    def close(self) -> None:
        """End all of them; AssertionError if anything of theirs is left on the machine."""
        for init in (*self._inits.values(), self._switch):
            os.kill(_child(init), signal.SIGKILL)
            init.wait(timeout=300)
        wait_until(lambda: not self._left(), 300, lambda: f"left behind: {self._left()}")

    def _left(self) -> list[str]:
        """Processes and mounts that name this group's folder."""
        mark = str(self.folder)
        found = [line for line in Path("/proc/mounts").read_text().splitlines() if mark in line]
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == mark or mark in " ".join(process.cmdline()):
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    # ---- commands ------------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Outside, of the host's first process."""
        return _child(self._inits[name])

    def start(self, name: str, *command: str | Path, **options: object) -> subprocess.Popen[str]:
        """Start a command on a host, in the repository's folder."""
        inside = ["nsenter", f"--target={self.pid(name)}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        full = [*inside, f"--wd={REPOSITORY}", "--", *map(str, command)]
        return subprocess.Popen(full, env=self.environment, text=True, **options)  # type: ignore[call-overload]

    def run(self, name: str, *command: str | Path, timeout_s: float = 300, check: bool = True) -> str:
        """Run a command on a host and return what it printed."""
        process = self.start(name, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            raise AssertionError(f"on {name}, still running after {timeout_s} s: {command}\n{printed}") from None
        assert not check or process.returncode == 0, f"on {name}: {command}: {process.returncode}\n{printed}"
        return printed

    def processes(self, name: str, word: str) -> list[psutil.Process]:
        """The host's processes with ``word`` in their command lines."""
        if name not in self._inits:
            return []
        space, found = os.readlink(f"/proc/{self.pid(name)}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                ours = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if ours and any(word in part for part in process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    # ---- help ----------------------------------------------------------------------------------------------------

    def _unshare(self, *namespaces: str, script: str) -> subprocess.Popen[bytes]:
        """A shell in new namespaces, which lives until it is killed and dies with this process."""
        ready = self.folder / f"ready-{time.monotonic_ns()}"
        # A shell collects orphans, as an init has to.
        full = f"set -e; {script}\ntouch {ready}; set +e; while true; do sleep 3600 & wait; done"
        command = ["setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child=KILL", *namespaces]
        said = self.folder / "hosts.log"
        with said.open("a") as log:
            process = subprocess.Popen(
                [*command, "bash", "-c", full],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(ready.exists, 300, lambda: f"namespaces did not come up: {tail(said)}")
        ready.unlink()
        return process

    def _in_switch(self, command: str) -> None:
        subprocess.run(["nsenter", f"--target={_child(self._switch)}", "--net", "bash", "-c", command], check=True)

    def _write_ssh(self) -> None:
        for key in ("id", "host"):
            if not (self.folder / key).exists():
                subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/id.pub\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/id\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  LogLevel ERROR\n  ConnectTimeout 5\n  ServerAliveInterval 2\n"
        )


def _child(unshare: subprocess.Popen[bytes]) -> int:
    return psutil.Process(unshare.pid).children()[0].pid


def wait_until(true: Callable[[], object], timeout_s: float, otherwise: Callable[[], str]) -> float:
    """Wait until ``true()``; AssertionError with ``otherwise()`` after ``timeout_s``. Returns the seconds it took."""
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > timeout_s:
            raise AssertionError(f"not within {timeout_s} s. {otherwise()}")
        time.sleep(0.1)
    return time.monotonic() - begun


def tail(path: Path, count: int = 4000) -> str:
    return path.read_text()[-count:] if path.is_file() else f"{path}: not there"
