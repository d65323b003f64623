"""The processes of the benchmark over several GPUs: none outlives the one that started it, or its time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.multi_gpu import ending
from benchmarks.multi_gpu.launching import ROOT, environment, kill_and_wait, said_of

WORKER = "import os, time; os.write(1, b'%d ' % os.getpid()); time.sleep(60)"
# as a part does: watches its input, and has a process of its own
PART = f"""
import os, subprocess, sys
from benchmarks.multi_gpu.ending import end_with_input
end_with_input()
os.write(1, b'%d ' % os.getpid())
subprocess.run([sys.executable, '-c', {WORKER!r}], stdin=subprocess.DEVNULL)
"""
# as bench_multi_gpu.py does: starts parts, and ends them when it is interrupted
PARENT = f"""
import signal, sys
from benchmarks.multi_gpu.ending import end_group, interrupt_on_signals, start_group
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
interrupt_on_signals()
child = start_group([sys.executable, '-c', {PART!r}])
try:
    child.wait()
finally:
    end_group(child)
"""


def gone(number: int) -> bool:
    """Whether a process ends within ten seconds; whoever has ended and was not yet waited for counts as gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return False


def numbers(stream, count: int) -> list[int]:
    """The ids that processes have written."""
    text = b""
    while text.count(b" ") < count:
        text += os.read(stream.fileno(), 100)
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_parts_end_with_the_script(number):
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment())
    started = numbers(parent.stdout, 2)
    parent.send_signal(number)
    left = [one for one in started if not gone(one)]
    assert left == [] and parent.wait(10) != 0
    parent.stdout.close()


@pytest.mark.parametrize("ignored", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_a_run_out_of_time_leaves_no_worker(tmp_path, monkeypatch, ignored):
    """A launcher that ends its own upon SIGTERM, as scripts/launch.py does, and one that hangs."""
    monkeypatch.setattr(ending.end_launcher, "__defaults__", (1.0,))
    ends = f"signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(1))); {ignored}"
    launcher = (
        f"import signal, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {WORKER!r}]); {ends}"
        "child.wait()"
    )
    with (tmp_path / "out").open("w") as out:
        assert ending.run_within([sys.executable, "-c", launcher], 2.5, stdout=out) is None
    [worker] = map(int, (tmp_path / "out").read_text().split())
    assert gone(worker)


def test_a_run_within_its_time_gives_its_status():
    assert ending.run_within([sys.executable, "-c", "raise SystemExit(7)"], 30) == 7


# as processes of scripts/launch.py: the last is killed, and the first hangs, or names it and ends
SILENT = "import time; time.sleep(60)"
EARLY = "import sys; sys.exit(4)"
HUNG = "import os, sys, time; sys.argv[-1] == '1' and os.write(1, b'x'); time.sleep(60)"
NAMES = """
import os, sys, time
if sys.argv[-1] == '1':
    os.write(1, b'x')
    time.sleep(60)
time.sleep(0.5)
os.write(2, b'lost process 1 of 2')
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        (SILENT, "no token in 1 s"),
        (EARLY, "ended before the first token"),
        (HUNG, "some were left 1 s after one was killed"),
        (NAMES, None),
    ],
    ids=["silent", "early", "hung", "fine"],
)
def test_a_kill_has_a_limit_and_a_record_whatever_the_run_does(tmp_path, program, wrong):
    launcher = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--processes", "2", "--devices-per-process", "1"]
    command = [*launcher, "--grace", "2", "--", sys.executable, "-c", program]
    begun, log = time.monotonic(), tmp_path / "kill.err"
    record = kill_and_wait(command, 2, log, begin_s=1 if program == SILENT else 20, end_s=1 if wrong else 10)
    assert time.monotonic() - begun < 15
    assert record["fine"] == record["named"] == (wrong is None) and (record["seconds"] is None) == (wrong is not None)
    assert record["wrong"] == (wrong and f"{wrong}, see {log}") and said_of(record)
