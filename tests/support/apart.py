"""A separate network for one hospital (Linux namespaces), with a relay to the server's port only.

`python -m tests.support.apart SOCKET PORT MODULE [ARGUMENT…]` leaves the machine's network, listens
on 127.0.0.1:PORT of the new one, passes every connection on to the Unix socket SOCKET (a file,
which namespaces share; a `Proxy` listens there), and becomes `python -m MODULE`. It works as root,
or as any user if the kernel allows it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.support.link import Proxy

REPOSITORY = Path(__file__).resolve().parents[2]
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # linux/sched.h
SET_FLAGS, UP = 0x8914, 1  # SIOCSIFFLAGS, IFF_UP
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def possible() -> bool:
    """Whether this machine lets us leave its network."""
    if sys.platform != "linux":
        return False
    command = [sys.executable, "-m", "tests.support.apart"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0


def network(pid: int) -> str:
    """Name of the network that a process is in."""
    return os.readlink(f"/proc/{pid}/ns/net")


def leave_network() -> None:
    """Move this process into a network that holds nothing but its own loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_NETWORK | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh", b"lo", UP))


def start_relay(port: int, target: Path) -> None:
    """Pass connections to 127.0.0.1:`port` on to a Unix socket, in a child of this process."""
    ready, told = os.pipe()
    if os.fork():
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    with Proxy(target, listen=port):
        os.write(told, b".")
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    leave_network()
    if len(sys.argv) > 1:
        start_relay(int(sys.argv[2]), Path(sys.argv[1]))
        os.execv(sys.executable, [sys.executable, "-P", "-m", *sys.argv[3:]])
