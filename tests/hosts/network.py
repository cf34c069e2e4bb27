"""Several hosts on one machine: own hostname, own network, own processes; cables that can be pulled. Linux, root.

They live in one PID namespace and one mount namespace, on a bridge that nothing outside is joined to. Its PID 1
(`tests/hosts/init.py`) hangs on a pipe from here: at the end of the `with` block, or when this process dies in
whichever way, everything that ran on the hosts is killed and no process, mount, namespace or control group is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from tests.commands import REPOSITORY, environment
from tests.hosts.init import BRIDGE, port
from tests.hosts.requirements import SEARCH_PATH
from tests.patience import PATIENCE_SECONDS
from tests.resume.processes import children

INIT = Path(__file__).with_name("init.py")
NAMESPACES = ("--mount", "--pid", "--net", "--uts")


class Hosts:
    """Hosts by name, from the `with` statement on. `cgroups`: freezer groups that the end is to remove."""

    def __init__(self, names: Sequence[str], cgroups: Iterable[str] = ()) -> None:
        self.addresses = {name: f"10.77.0.{number + 1}" for number, name in enumerate(names)}
        self._cgroups = list(cgroups)
        self._ports = {name: port(number) for number, name in enumerate(names)}
        self._holders: dict[str, int] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._init = 0

    def __enter__(self) -> Hosts:
        world = json.dumps({"addresses": self.addresses, "cgroups": self._cgroups})
        init = [sys.executable, "-I", str(INIT), world]
        self._owner = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--", *init],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PATH": SEARCH_PATH},
        )  # fmt: skip
        try:
            assert self._owner.stdout
            line = self._owner.stdout.readline()
            assert line, "the hosts could not be set up: see stderr"
            self._init = children(self._owner.pid)[0]
            seen_from_inside = {_number_inside(process): process for process in children(self._init)}
            self._holders = {name: seen_from_inside[number] for name, number in json.loads(line).items()}
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs on the hosts, and the hosts."""
        assert self._owner.stdin
        assert self._owner.stdout
        self._owner.stdin.close()
        try:
            self._owner.wait(PATIENCE_SECONDS)
        finally:
            if self._owner.poll() is None and self._init:  # it hangs: without its PID 1 the kernel ends the rest
                os.kill(self._init, signal.SIGKILL)
            self._owner.kill()
            self._owner.wait()
            self._owner.stdout.close()
        for process in self._started:
            process.wait(PATIENCE_SECONDS)

    def path(self, inside: str) -> Path:
        """Where a file of the hosts (their /run is their own) is found from here."""
        return Path(f"/proc/{self._init}/root{inside}")

    def start(
        self,
        host: str,
        command: Sequence[str],
        log: IO[bytes] | None = None,
        environ: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host. stdout and stderr go to `log`, or nowhere; signals are for `processes`."""
        process = subprocess.Popen(
            self._on(host, command, cwd),
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=_environment(environ),
        )
        self._started.append(process)
        return process

    def run(
        self,
        host: str,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        check: bool = True,
        timeout: float = PATIENCE_SECONDS,
    ) -> str:
        """Run a command on a host to its end; its stdout. With `check`, a non-zero end fails the test."""
        done = subprocess.run(
            self._on(host, command, cwd),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment(environ), timeout=timeout,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command} on {host}: {done.stdout}{done.stderr}"
        return done.stdout

    def _on(self, host: str, command: Sequence[str], cwd: Path) -> list[str]:
        return ["nsenter", f"--target={self._holders[host]}", *NAMESPACES, f"--wd={cwd}", "--", *command]

    def processes(self, host: str, having: str = "") -> list[int]:
        """Processes on a host, numbered as outside, whose command line or environment contains `having`."""
        holder = self._holders[host]
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            process = int(folder.name)
            with suppress(OSError):  # it ended while we looked
                # Not by the hostname alone: nsenter has it as well, and waits outside.
                here = process != holder and all(_same_namespace(process, holder, kind) for kind in ("uts", "pid"))
                if here and having.encode() in _words(folder):
                    found.append(process)
        return sorted(found)

    def split_evenly(self, host: str) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        self._bridge("link", "set", self._ports[host], "nomaster")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        self._bridge("link", "set", self._ports[host], "master", BRIDGE)

    def _bridge(self, *command: str) -> None:
        subprocess.run(
            ["nsenter", f"--target={self._init}", "--net", "ip", *command],
            check=True, timeout=PATIENCE_SECONDS, env=_environment(None),
        )  # fmt: skip


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return environment(PATH=SEARCH_PATH, PYTHONPATH=str(REPOSITORY)) | dict(more or {})


def _number_inside(process: int) -> int:
    """A process's number in the innermost PID namespace that it is in."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("NSpid:")[1].split("\n")[0].split()[-1])


def _same_namespace(one: int, other: int, kind: str) -> bool:
    return Path(f"/proc/{one}/ns/{kind}").stat().st_ino == Path(f"/proc/{other}/ns/{kind}").stat().st_ino


def _words(process: Path) -> bytes:
    return (process / "cmdline").read_bytes() + b"\0" + (process / "environ").read_bytes()
