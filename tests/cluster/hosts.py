"""Several hosts on one machine: each has an address, processes, /tmp, a home and an SSH server of its own.

Needs root, and Debian's packages iproute2, openssh-server and rsync. Everything lies in namespaces that are
made here: no process or address of the machine is touched, and all of it is gone when the context ends.
"""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

NETWORK = "10.77.0"
"""Addresses inside the namespaces only."""

SSHD = """
HostKey {base}/host_key
AuthorizedKeysFile {base}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

START = """
set -e
mount --make-rprivate /
home={base}/{name}
mkdir -p $home/.pyenv
if [ -d ~/.pyenv ]; then mount --bind ~/.pyenv $home/.pyenv; fi
ln -sfn {venv} $home/venv
mount --rbind $home ~
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
hostname {name}
exec {service}
"""


class Host:
    """One host: a process tree in namespaces of its own."""

    def __init__(self, base: Path, name: str, number: int, venv: Path, ssh: bool = True) -> None:
        """Start it; only hosts with `ssh` can be logged in to."""
        self.base, self.name, self.address = base, name, f"{NETWORK}.{number}"
        self.namespace = f"{base.name}-{number}"
        self._network(number)
        server = f"/usr/sbin/sshd -D -e -f {base}/sshd_config -o ListenAddress={self.address}"
        script = START.format(base=base, name=name, venv=venv, service=server if ssh else "sleep infinity")
        inside = [
            "unshare",
            "--mount",
            "--pid",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            script,
        ]
        with (base / f"{name}.log").open("w") as log:
            command = ["ip", "netns", "exec", self.namespace, *inside]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _network(self, number: int) -> None:
        switch = f"{self.base.name}-switch"
        host, port = f"eth{number}", f"port{number}"
        for command in (
            f"ip netns add {self.namespace}",
            f"ip link add {host} netns {self.namespace} type veth peer name {port} netns {switch}",
            f"ip -n {switch} link set {port} master bridge up",
            f"ip -n {self.namespace} addr add {self.address}/24 dev {host}",
            f"ip -n {self.namespace} link set {host} up",
            f"ip -n {self.namespace} link set lo up",
            # Ray finds its own address by the route that it would take outwards; no packet goes there.
            f"ip -n {self.namespace} route add default dev {host}",
        ):
            subprocess.run(command.split(), check=True)

    @property
    def pid(self) -> int:
        """The first process inside, by its number outside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def run(self, command: str, timeout: float = 300, check: bool = True) -> str:
        """Run a shell command on the host as root; return what it printed."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--uts"]
        done = subprocess.run(
            [*enter, "bash", "-c", f"cd ~ && {command}"],
            text=True, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {command}\n{done.stdout}"
        return done.stdout

    def kill(self) -> None:
        """Take the host away, as a power cut does."""
        self.process.kill()
        self.process.wait()
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False)


class Hosts:
    """A laptop and the hosts that it can log in to; use it as a context manager."""

    def __init__(self, names: list[str], venv: Path) -> None:
        """Name the hosts; `venv` is linked as ~/venv on each."""
        self.names, self.venv = names, venv
        self.base = Path(tempfile.mkdtemp(prefix="fsc", dir="/var/tmp"))
        self.all: dict[str, Host] = {}

    def __enter__(self) -> "Hosts":
        """Make the keys, the network and the hosts."""
        try:
            for key in ("key", "host_key"):
                subprocess.run(f"ssh-keygen -q -t ed25519 -N '' -f {self.base}/{key}", shell=True, check=True)
            (self.base / "sshd_config").write_text(SSHD.format(base=self.base))
            switch = f"{self.base.name}-switch"
            for command in (
                f"ip netns add {switch}",
                f"ip -n {switch} link add bridge type bridge",
                f"ip -n {switch} link set bridge up",
            ):
                subprocess.run(command.split(), check=True)
            self.all["laptop"] = Host(self.base, "laptop", 10, self.venv, ssh=False)
            for number, name in enumerate(self.names, 11):
                self.all[name] = Host(self.base, name, number, self.venv)
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def _wait(self) -> None:
        login = f"ssh -o StrictHostKeyChecking=no -o ConnectTimeout=2 -i {self.base}/key"
        end = time.monotonic() + 30
        time.sleep(1)
        for name in self.names:
            while "up" not in self.all["laptop"].run(
                f"{login} root@{self.all[name].address} echo up", check=False
            ):
                assert time.monotonic() < end, (self.base / f"{name}.log").read_text()
                time.sleep(0.5)

    def close(self) -> None:
        """Remove everything."""
        for host in self.all.values():
            host.kill()
        subprocess.run(["ip", "netns", "delete", f"{self.base.name}-switch"], check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything."""
        self.close()
