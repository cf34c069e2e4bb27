"""PID 1 of a small world of hosts. Started by `tests/hosts/network.py`, as root, in new namespaces.

Each host is a network namespace and a hostname of its own; a bridge joins them. When the standard input closes (its
owner is done, or dead), every process in the world is killed, the control groups it was told of are removed, and what
else there is (namespaces, mounts, links) goes with the last process: the kernel holds it in nobody's name.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BRIDGE = "bridge"
CGROUPS = Path("/run/cgroup")
KILL_SECONDS = 20.0


def set_up(addresses: dict[str, str]) -> dict[str, int]:
    """Build the hosts; the process, as this world counts, that holds each host's namespaces open."""
    _run("mount", "--make-rprivate", "/")
    # What is written below /run lies in memory, is seen by this world alone, and goes with it.
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
    Path("/run/hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    _run("mount", "--bind", "/run/hosts", "/etc/hosts")
    Path("/run/resolv.conf").write_text("")  # no host here can ask a name server: let nobody wait for one
    with suppress(subprocess.CalledProcessError):
        _run("mount", "--bind", "/run/resolv.conf", "/etc/resolv.conf")
    (CGROUPS / "freezer").mkdir(parents=True)
    _run("mount", "-t", "cgroup", "-o", "freezer", "freezer", str(CGROUPS / "freezer"))
    _ip("link set lo up", f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")
    return {name: _host(name, address, number) for number, (name, address) in enumerate(addresses.items())}


def port(number: int) -> str:
    """The bridge's end of a host's cable."""
    return f"port{number}"


def _host(name: str, address: str, number: int) -> int:
    command = f"hostname {name} && echo ready && exec sleep infinity"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert holder.stdout
    if holder.stdout.readline() != b"ready\n":
        raise OSError(f"no namespaces for {name}")
    _ip(
        f"link add {port(number)} type veth peer name eth0 netns {holder.pid}",
        f"link set {port(number)} master {BRIDGE} up",
    )
    own = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    _ip("link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up", inside=own)
    return holder.pid


def _run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, check=True, input=text, text=True, stdin=None if text else subprocess.DEVNULL)


def _ip(*lines: str, inside: list[str] | None = None) -> None:
    _run(*(inside or []), "ip", "-batch", "-", text="\n".join(lines) + "\n")


def wait_for_the_end() -> None:
    """Reap what dies, as PID 1 must, until the standard input closes."""
    while not select.select([sys.stdin], [], [], 0.2)[0] or os.read(sys.stdin.fileno(), 1024):
        _reap()


def kill_everything(cgroups: list[str]) -> None:
    """Kill until nobody is left, and remove the control groups, which would outlive the namespaces."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for group in cgroups:  # a frozen process does not die
            for state in (CGROUPS / "freezer" / group).rglob("freezer.state"):
                with suppress(OSError):
                    state.write_text("THAWED")
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        _reap()
        if sum(entry.name.isdecimal() for entry in Path("/proc").iterdir()) == 1:
            break
        time.sleep(0.02)
    for group in cgroups:
        for folder, _, _ in os.walk(CGROUPS / "freezer" / group, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    if os.getpid() != 1:
        sys.exit("must be process 1 of its own PID namespace: it kills everything that it can see")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for pytest, which then closes our input
    world: dict[str, Any] = json.loads(sys.argv[1])
    try:
        print(json.dumps(set_up(world["addresses"])), flush=True)
        wait_for_the_end()
    finally:
        kill_everything(world["cgroups"])


if __name__ == "__main__":
    main()
