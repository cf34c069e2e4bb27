"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd on each host of `tests/hosts/network.py`.

It lives in its hosts: configuration, spool and state are in their /run, so nothing outside is written but the freezer
groups by which slurmd tracks its processes, and those the hosts remove. Everything is told to be quick where a real
cluster is patient: a lost node is down after about ten seconds, a requeued job is held for a few.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from tests.commands import REPOSITORY
from tests.hosts.network import Hosts
from tests.patience import wait_until

HEAD = "head"
ETC = "/run/slurm"
CPUS = 8
GPUS = 4
GRACE_SECONDS = 20
NODE_LOST_SECONDS = 10
POLL_SECONDS = 0.7
"""Between two looks at a job: many are waited for at once, and each look starts a program."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")

Job = dict[str, str]
"""What `scontrol show job` says of a job: its fields."""


class Cluster:
    """A cluster of `size` nodes, from the `with` statement on.

    Partitions: `low` (the default; its jobs are requeued for those of `high`, after a grace time) and `high` on the
    same nodes; `island` and `islet` on two nodes each, which are in no other.
    """

    def __init__(self, size: int = 16) -> None:
        # Freezer groups carry the node's name and are the whole machine's: two clusters must not share names.
        token = "".join(secrets.choice("bcdfghjkmnpqrstvwxz") for _ in range(5))
        self.nodes = [f"{token}-node{number + 1}" for number in range(size)]
        self.hosts = Hosts([HEAD, *self.nodes], cgroups=[f"slurm_{node}" for node in self.nodes])
        self._stack = ExitStack()
        self._quiet = threading.RLock()

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            stack.enter_context(self.hosts)
            self._console = stack.enter_context(tempfile.TemporaryFile())
            self._start_daemons()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_daemons(self) -> None:
        etc = self.hosts.path(ETC)
        for folder in ("", "state", "log", "dev", *(f"spool-{node}" for node in self.nodes)):
            (etc / folder).mkdir()
        for number in range(GPUS):
            (etc / f"dev/nvidia{number}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"Name=gpu File={ETC}/dev/nvidia[0-{GPUS - 1}]\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/run/cgroup\n")
        (etc / "plugstack.conf").write_text("")
        key = etc / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        self._configure()
        files = [f"--{name}-file={ETC}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(HEAD, "munged", "--foreground", f"--socket={ETC}/munge.socket", *files)
        wait_until((etc / "munge.socket").exists, "munged")
        self._daemon(HEAD, "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes", self.logs)

    def _daemon(self, host: str, *command: str) -> None:
        self.hosts.start(host, command, log=self._console, environ=self._environment({}))

    def _configure(self, *parameters: str) -> None:
        text = _CONFIGURATION.format(
            etc=ETC, head=HEAD, cpus=CPUS, gpus=GPUS, grace=GRACE_SECONDS, node_lost=NODE_LOST_SECONDS,
            nodes=",".join(self.nodes), mainland=",".join(self.nodes[:-4]), island=",".join(self.nodes[-4:-2]),
            islet=",".join(self.nodes[-2:]),
        )  # fmt: skip
        if parameters:
            text += f"SlurmctldParameters={','.join(parameters)}\n"
        (self.hosts.path(ETC) / "slurm.conf").write_text(text)

    @contextmanager
    def preempting(self, *, user_signal: bool = False) -> Iterator[None]:
        """Preempt in this block, with TERM or with the signal of `--signal`: one setting for the whole cluster."""
        with self._quiet:
            if user_signal:
                self._configure("preempt_send_user_signal")
                self.command("scontrol", "reconfigure")
            try:
                yield
            finally:
                if user_signal:
                    self._configure()
                    self.command("scontrol", "reconfigure")

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"SLURM_CONF": f"{ETC}/slurm.conf", **more}

    def command(
        self, *command: str, environ: Mapping[str, str] | None = None, cwd: Path = REPOSITORY, check: bool = True
    ) -> str:
        """A command on the head node, in the repository root; its stdout."""
        return self.hosts.run(HEAD, command, environ=self._environment(environ or {}), cwd=cwd, check=check)

    def job(self, job: str) -> Job:
        """What Slurm knows of a job."""
        text = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job: str, condition: Callable[[Job], object], what: str) -> Job:
        """Poll a job until `condition` holds."""

        def fulfilled() -> Job:
            known = self.job(job)
            return known if condition(known) else {}

        return wait_until(
            fulfilled, f"job {job} {what}", lambda: f"{self.job(job)}{self.logs(job)}", pause=POLL_SECONDS
        )

    def wait_for_end(self, job: str) -> Job:
        """Wait until a job has ended for good."""
        return self.wait_for(job, lambda known: known["JobState"] in ENDED, "to end")

    def nodes_of(self, job: str) -> list[str]:
        """Hosts of a running job; its batch script runs on the first."""
        return self.command("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def node_states(self) -> dict[str, str]:
        """Node -> idle, alloc, down, ..."""
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return {name: state.rstrip("*$~") for name, state in (line.split() for line in lines)}

    def restore(self, node: str) -> None:
        """Mend a node's cable, and tell slurmctld, which would take most of a minute to notice."""
        self.hosts.mend(node)
        self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def logs(self, job: str = "") -> str:
        """The end of the daemons' logs, and the output of a job."""
        files = sorted(self.hosts.path(f"{ETC}/log").glob("*.log"))
        texts = [(path.name, path.read_text(errors="replace").splitlines()[-15:]) for path in files]
        if job and (output := Path(self.job(job).get("StdOut", ""))).is_file():
            texts.append((output.name, output.read_text(errors="replace").splitlines()[-60:]))
        return "".join(f"\n--- {name}\n" + "\n".join(lines) for name, lines in texts)


_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={head}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its former credential has expired.
AuthInfo=socket={etc}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={etc}/state
SlurmdSpoolDir={etc}/spool-%n
SlurmctldPidFile={etc}/slurmctld.pid
SlurmdPidFile={etc}/slurmd-%n.pid
SlurmctldLogFile={etc}/log/slurmctld.log
SlurmdLogFile={etc}/log/%n.log
PlugStackConfig={etc}/plugstack.conf
MailProg=/bin/true
# As in production: of a step, only the processes that slurmd started hear a signal; linuxproc signals the ranks too.
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# The nodes are said to have more cores than this machine.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={node_lost}
MessageTimeout=5
InactiveLimit=0
KillWait=20
MinJobAge=3600
UnkillableStepTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=low Nodes={mainland} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=high Nodes={mainland} PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=island Nodes={island} State=UP
PartitionName=islet Nodes={islet} State=UP
"""
