"""Stand-ins for `ssh` and `pdsh` that reach the nodes of tests/helpers/nodes.py, for
DeepSpeed's own launcher.

    ssh [options] HOST COMMAND...              the command there, by its shell
    pdsh [options] -w HOST,HOST COMMAND...     the same on all at once; %n is the host's number

As over a real connection, a command gets nothing of the caller's environment, starts in the
home folder and is one line for a shell. `install` puts both into a folder for PATH.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

NODES = "TEST_NODES"
"""Environment variable: ADDRESS=PID,ADDRESS=PID; the process lives in the node's
namespaces.
"""


def install(folder):
    folder.mkdir()
    for name in ("ssh", "pdsh"):
        program = folder / name
        program.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def start(host, line):
    holder = dict(pair.split("=") for pair in os.environ[NODES].split(","))[host]
    enter = [
        "nsenter",
        "-t",
        holder,
        "-U",
        "-n",
        "--preserve-credentials",
        "sh",
        "-c",
        line,
    ]
    clean = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.Popen(
        enter, env=clean, cwd=clean.get("HOME", "/"), stdin=subprocess.DEVNULL
    )


def main(program, words):
    hosts = ""
    while words and words[0].startswith("-"):
        option = words.pop(0)
        value = words.pop(0) if option in ("-o", "-p", "-w", "-f") else ""
        hosts = value if option == "-w" else hosts
    hosts = hosts if program == "pdsh" else words.pop(0)
    line = " ".join(words)
    running = [
        start(host, line.replace("%n", str(number)))
        for number, host in enumerate(hosts.split(","))
    ]
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
