"""Machines of a site on this one: for each a network, mount, process, host name and IPC namespace, with sshd in it.

A host sees this machine's programs, and of its own have its address, its name, its `/tmp`, `/home`, `/root`, `/run`,
`/dev/shm` and whatever differs in `/etc` (users, `/etc/hosts`, `/etc/deeptrust`). Hosts reach each other by a bridge
in a namespace of its own, and nothing else: neither this machine nor the internet. What they keep on disk outlives
`power_off`. Everything hangs on processes that end with the one that made them: no namespace has a name, no mount,
bridge or link is this machine's own. Wants root. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Who logs in: without rights of its own.
USER, UID = "deeptrust", 47100
NETWORK = "10.77.0"
_CLONE_NEWNET = 0x40000000
#: Ends with whoever started it.
_LEASH = ("setpriv", "--pdeathsig", "KILL")
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")

# Of what /root and /tmp hide, the environment is shown again, where it lies there.
_START = r"""
set -eu
mount --make-rprivate /
mount --bind $DISK/home /home
mount -t overlay overlay -o lowerdir=/etc,upperdir=$DISK/etc,workdir=$DISK/etc.work /etc
mount -t overlay overlay -o lowerdir=$ENVIRONMENT,upperdir=$DISK/venv,workdir=$DISK/venv.work $INSTALLED
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
for cover in /root:755 /tmp:1777; do
  mount -t tmpfs -o mode=${cover#*:} tmpfs $DISK/cover
  for folder in $ENVIRONMENT $PYTHON; do
    case $folder in ${cover%:*}/*)
      below=$DISK/cover/${folder#${cover%:*}/}
      mkdir -p $below
      mount --bind $folder $below;;
    esac
  done
  mount --move $DISK/cover ${cover%:*}
done
hostname $NAME
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add $ADDRESS/24 dev eth0
ip link set eth0 up
ip route add default via $GATEWAY
cd /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -D -e -f /etc/ssh/sshd_here
"""

_SSHD = """
ListenAddress {address}
HostKey {key}
PasswordAuthentication no
UsePAM no
PermitRootLogin no
MaxStartups 50:30:100
PrintMotd no
"""


class HostsError(RuntimeError):
    """A host cannot be made or does not do what it was told; the message says why."""


def why_not() -> str:
    """Why hosts cannot be made here, or ""."""
    if os.geteuid() != 0:
        return "namespaces and links want root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not here: {', '.join(missing)}: apt-get install openssh-server iproute2 util-linux rsync"
    probe = (
        "ip link add left type veth peer name right && ip link add middle type bridge && ip link set left master middle"
    )
    tried = subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"the kernel refuses veth links or bridges: {tried.stderr.strip()}"


@dataclass
class Host:
    """One machine: on or off."""

    name: str
    address: str
    folder: Path
    site: Site
    process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """Its user's home folder, seen from outside."""
        return self.folder / "home" / USER

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file under its `/etc`, or, with a relative path, in its user's home folder; while it is off."""
        assert self.process is None
        file = self.folder / path.lstrip("/") if path.startswith("/etc/") else self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def power_on(self, timeout_s: float = 30.0) -> None:
        """Start it, with nothing in memory that was there before; returns when it can be logged in to.

        Raises:
            HostsError: it did not come up.
        """
        assert self.process is None
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DISK": str(self.folder),
            "ENVIRONMENT": os.path.realpath(sys.prefix),
            "PYTHON": os.path.realpath(sys.base_prefix),
            "INSTALLED": f"/home/{USER}/deeptrust/venv",
            "NAME": self.name,
            "ADDRESS": self.address,
            "GATEWAY": f"{NETWORK}.1",
        }
        spaces = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        for leftover in ("etc.work", "venv.work"):
            shutil.rmtree(self.folder / leftover, ignore_errors=True)
            (self.folder / leftover).mkdir()
        with (self.folder / "console.log").open("a") as console:
            self.process = subprocess.Popen(
                [*_LEASH, "unshare", *spaces, "bash", "-c", _START],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.site.connect(self)
        limit = time.monotonic() + timeout_s
        while self.run("true", check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > limit:
                self.power_off()
                raise HostsError(f"{self.name} did not come up:\n{(self.folder / 'console.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def power_off(self) -> None:
        """As by pulling its plugs: nobody is told anything, the network's first."""
        if self.process is None:
            return
        self.site.disconnect(self)
        self.process.kill()
        self.process.wait()
        self.process = None

    @property
    def init(self) -> int:
        """Its first process, by this machine's number."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def command(self, command: str) -> list[str]:
        """What logs in to it from the site's network and has its shell run a command."""
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5")
        ssh = ["ssh", "-i", str(self.site.key), *(word for option in options for word in ("-o", option))]
        return [*self.site.inside, *ssh, f"{USER}@{self.address}", f"bash -lc {shlex.quote(command)}"]

    def run(
        self, command: str, timeout_s: float = 120.0, check: bool = True, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it, as its user.

        Raises:
            HostsError: it failed; the message has what it printed.
        """
        done = subprocess.run(
            self.command(command), input=given or "", capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode != 0:
            raise HostsError(
                f"{self.name}: `{command}` ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done


@dataclass
class Site:
    """Hosts, and the bridge between them."""

    folder: Path
    switch: subprocess.Popen[bytes]
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """What logs in everywhere."""
        return self.folder / "key"

    @property
    def inside(self) -> list[str]:
        """What puts a command into the site's network."""
        return ["nsenter", f"--net=/proc/{self.switch.pid}/ns/net"]

    def network(self, *words: str, check: bool = True) -> None:
        """`ip` in the site's network."""
        subprocess.run([*self.inside, "ip", *words], check=check, capture_output=not check)

    def connect(self, host: Host) -> None:
        """A cable from a host to the bridge."""
        assert host.process is not None
        limit = time.monotonic() + 10
        while _network_of(host.process.pid) == _network_of(os.getpid()):  # it has not got as far as its own
            if host.process.poll() is not None or time.monotonic() > limit:
                raise HostsError(f"{host.name}: no namespaces:\n{(host.folder / 'console.log').read_text()[-2000:]}")
            time.sleep(0.02)
        # a name of an earlier life may be there until the kernel has cleaned up
        self.network("link", "del", host.name, check=False)
        # a host's own card stays the same when it comes back: others remember it
        card = "02:77:00:00:00:" + f"{int(host.address.rsplit('.', 1)[1]):02x}"
        far_end = ("peer", "name", "eth0", "address", card, "netns", str(host.process.pid))
        self.network("link", "add", host.name, "type", "veth", *far_end)
        self.network("link", "set", host.name, "master", "bridge", "up")

    def disconnect(self, host: Host) -> None:
        """Pull a host's cable."""
        self.network("link", "set", host.name, "down", check=False)

    def enter(self) -> None:
        """Put the calling thread into the site's network, for good: what it connects to from now on is there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{self.switch.pid}/ns/net").open() as space:
            if libc.setns(space.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def add(self, name: str, number: int) -> Host:
        """A host that is off: its disk with a user who may log in."""
        host = Host(name, f"{NETWORK}.{number}", self.folder / name, self)
        for folder in ("etc/ssh", "etc/deeptrust", "venv", "cover"):
            (host.folder / folder).mkdir(parents=True)
        (host.home / "deeptrust" / "venv").mkdir(parents=True)
        passwd = f"{USER}:x:{UID}:{UID}::/home/{USER}:/bin/bash\n"
        for file, line, mode in (
            ("passwd", passwd, 0o644),
            ("group", f"{USER}:x:{UID}:\n", 0o644),
            ("shadow", f"{USER}:*:19000:0:99999:7:::\n", 0o600),
        ):
            host.write(f"/etc/{file}", Path(f"/etc/{file}").read_text() + line, mode)
        host.write("/etc/hosts", f"127.0.0.1 localhost\n{host.address} {name}\n")
        host.write("/etc/hostname", f"{name}\n")
        host.write("/etc/resolv.conf", "")
        host.write("/etc/ssh/sshd_here", _SSHD.format(address=host.address, key="/etc/ssh/host_key"))
        new_key(host.folder / "etc" / "ssh" / "host_key")
        host.write(".ssh/authorized_keys", self.key.with_suffix(".pub").read_text(), 0o600)
        host.write(".bashrc", "")
        own(host.home)
        self.hosts[name] = host
        return host


def _network_of(process: int) -> Path:
    return Path(f"/proc/{process}/ns/net").readlink()


def new_key(path: Path) -> None:
    """A key of ssh without a pass phrase, and its public half beside it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def own(folder: Path) -> None:
    """Give a folder and what is in it to the hosts' user."""
    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(folder)], check=True)


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A network without hosts; hosts that were added to it are off and their processes gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    switch = subprocess.Popen([*_LEASH, "unshare", "--net", "sleep", "infinity"])
    made = Site(folder, switch)
    try:
        new_key(made.key)
        limit = time.monotonic() + 10
        while _network_of(switch.pid) == _network_of(os.getpid()):
            if time.monotonic() > limit:
                raise HostsError("unshare made no network")
            time.sleep(0.02)
        made.network("link", "set", "lo", "up")
        made.network("link", "add", "bridge", "type", "bridge")
        made.network("addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
        made.network("link", "set", "bridge", "up")
        # who asks for something outside is told at once that there is nothing
        made.network("route", "add", "unreachable", "default")
        forward = "echo 1 >/proc/sys/net/ipv4/ip_forward"
        subprocess.run([*made.inside, "sh", "-c", forward], check=True)
        yield made
    finally:
        for host in made.hosts.values():
            host.power_off()
        switch.kill()
        switch.wait()
