"""Start, stop and question the worker processes of peers.py."""
import json
import os
import signal
import subprocess
from pathlib import Path

SCRIPT = str(Path(__file__).with_name("worker.py"))
TICKS = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Processor time that the whole machine has used since it started."""
    user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / TICKS


def prepare(name: str, python: str, checkpoint: Path, folder: Path, device: str = "cpu") -> dict:
    """What the engine's model is, or {"error": one line}."""
    done = subprocess.run([python, SCRIPT, "prepare", name, str(checkpoint), str(folder), device], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        return {"error": _last_line(done.stderr)}
    return json.loads(done.stdout) | {"python": python}


def _last_line(text):
    return (text.strip().splitlines() or ["it ended without a word"])[-1]


def _set_priority(pid, nice):
    """At once, so that its threads take it over. Linux weighs sessions first, if autogroups are on, and processes then."""
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text(str(nice))


class Worker:
    """One engine's process. It is stopped (SIGSTOP) except while it answers: its spinning threads disturb nobody."""

    def __init__(self, name: str, python: str, path: str, context: int, threads: int, nice: int, device: str = "cpu"):
        self.name = name
        command = [python, SCRIPT, "run", name, path, str(context), str(threads), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        if nice:
            _set_priority(self.process.pid, nice)

    def ask(self, what: str, **details):
        """The worker's reply to one request."""
        os.kill(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": what} | details) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise RuntimeError(f"{self.name} ended while asked for {what}: its own message is above")
        os.kill(self.process.pid, signal.SIGSTOP)
        return json.loads(reply)

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        self.process.kill()  # ends a stopped process too
        self.process.wait()
