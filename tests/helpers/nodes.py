"""Two "nodes" on one machine: namespaces with an address and mounts of their own, and a
cable that can be cut.

with two_nodes() as nodes:
    nodes[0].start(command, ...), nodes[1].start(command, ...), nodes[1].unplug()
"""

import contextlib
import subprocess
import time
from dataclasses import dataclass

from tests.helpers.jobs import environment

INTERFACE = "veth"


@dataclass(frozen=True)
class Node:
    holder: int
    """A process that does nothing but live in the node's namespaces."""
    address: str

    def command(self, words):
        return [
            "nsenter",
            "-t",
            str(self.holder),
            "-U",
            "-n",
            "-m",
            "--preserve-credentials",
            *words,
        ]

    def start(self, words, log, **more):
        """gloo would look for the machine's own name otherwise, which no namespace has an
        address for.
        """
        env = {**environment(), "GLOO_SOCKET_IFNAME": INTERFACE}
        with log.open("w") as file:
            return subprocess.Popen(
                self.command(words),
                stdout=file,
                stderr=file,
                env=env,
                text=True,
                **more,
            )

    def run(self, *words):
        subprocess.run(self.command(words), check=True, capture_output=True, text=True)

    def unplug(self):
        self.run("ip", "link", "set", INTERFACE, "down")


def trouble():
    """Why this machine cannot do it, if it cannot."""
    try:
        with two_nodes():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', None) or error}"


@contextlib.contextmanager
def two_nodes():
    with contextlib.ExitStack() as stack:
        first = Node(_hold(stack, ["unshare", "-rnm"]), "10.77.0.1")
        inner = first.command(["unshare", "-nm"])
        second = Node(_hold(stack, inner), "10.77.0.2")
        peer = ["peer", "name", INTERFACE, "netns", str(second.holder)]
        first.run("ip", "link", "add", INTERFACE, "type", "veth", *peer)
        for node in (first, second):
            node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                node.run("ip", "link", "set", interface, "up")
        yield first, second


def _hold(stack, unshare):
    """Start a process in namespaces of its own, which live as long as it does."""
    ready = subprocess.Popen(
        [*unshare, "sh", "-c", "echo ready; exec sleep 3600"],
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(ready.wait)
    stack.callback(ready.kill)
    assert ready.stdout is not None
    if ready.stdout.readline() != "ready\n":
        raise OSError(f"{' '.join(unshare)} failed with code {ready.wait()}")
    return ready.pid


def wait_for(path, processes):
    """Until `path` exists; the processes must go on meanwhile."""
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        assert all(process.poll() is None for process in processes), (
            "a process ended too early"
        )
        time.sleep(0.02)
