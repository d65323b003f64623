"""scripts/launch.py: what each process is told, who ends when one fails, how hosts are reached."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "launch.py"
# in one write each, for lines of several processes must not mix
SHOW = "import json, os, sys; os.write(1, (json.dumps([sys.argv[1:], sys.stdin.read()]) + chr(10)).encode())"


def launch(*argv: str, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, str(SCRIPT), *argv], **options)


def told(text: str) -> list[tuple[dict[str, str], str]]:
    """(options, standard input) of each process, in order."""
    found = []
    for argv, given in map(json.loads, text.splitlines()):
        found.append((dict(zip(argv[::2], argv[1::2], strict=True)), given))
    return sorted(found, key=lambda one: int(one[0]["--process-id"]))


def test_each_process_gets_its_number_and_devices_and_the_first_the_input():
    done = launch("--processes", "2", "--devices-per-process", "4", "--", sys.executable, "-c", SHOW, input="hello")
    assert done.returncode == 0 and done.stderr == ""
    (first, words), (second, nothing) = told(done.stdout)
    assert (words, nothing) == ("hello", "")
    assert first["--local-device-ids"] == "0,1,2,3" and second["--local-device-ids"] == "4,5,6,7"
    assert first["--coordinator"] == second["--coordinator"] and first["--num-processes"] == "2"


def test_one_node_of_several():
    argv = ("--nodes", "2", "--node", "1", "--coordinator", "node1:29400", "--", sys.executable, "-c", SHOW)
    [(options, given)] = told(launch(*argv, input="hello").stdout)
    assert options == {"--coordinator": "node1:29400", "--num-processes": "2", "--process-id": "1"} and given == ""


def fake_ssh(folder: Path) -> str:
    """A shell with nothing of this environment, apart from this terminal's processes, as another host's would be."""
    script = folder / "fake ssh.sh"
    clean = "exec setsid env -i PATH=/usr/bin:/bin sh -c"
    script.write_text(f'echo "$1" >> "$(dirname "$0")/hosts"; shift; cd /; {clean} "$1"\n')
    return f"sh '{script}'"


def test_hosts_are_reached_by_the_command_that_was_given(tmp_path):
    folder = tmp_path / "work here"
    folder.mkdir()
    where = "import os, sys; os.write(1, (os.getcwd() + sys.prefix + chr(10)).encode())"
    tool = Path(sys.executable).name  # found beside the Python that runs the script, as minimax-jax is
    done = launch("--hosts", "a,b", "--ssh", fake_ssh(tmp_path), "--", tool, "-c", where, cwd=folder)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"{folder}{sys.prefix}"] * 2
    assert sorted((tmp_path / "hosts").read_text().split()) == ["a", "b"]


def test_hosts_end_their_processes_when_the_script_is_gone(tmp_path):
    sleep = (
        "import os, sys, time; number = sys.argv[sys.argv.index('--process-id') + 1]; "
        "os.write(1, f'{number} {os.getpid()}{chr(10)}'.encode()); time.sleep(60 if number == '1' else 3)"
    )
    command = [sys.executable, str(SCRIPT), "--hosts", "a,b", "--ssh", fake_ssh(tmp_path), "--", sys.executable, "-c"]
    launched = subprocess.Popen([*command, sleep], stdout=subprocess.PIPE, text=True)
    told = dict(launched.stdout.readline().split() for _ in range(2))
    launched.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{told['1']}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{told['1']}").exists()
    launched.wait()


FAIL = "import sys, time; number = sys.argv[sys.argv.index('--process-id') + 1]; time.sleep(60 if number == '0' else 0)"


def test_when_one_fails_all_end():
    begun = time.monotonic()
    program = f"{FAIL}; sys.exit(7)"
    command = ("--processes", "2", "--devices-per-process", "1", "--grace", "1", "--", sys.executable, "-c", program)
    done = launch(*command)
    assert done.returncode == 7 and time.monotonic() - begun < 20
    assert done.stderr == "launch.py: process 1 ended first, with status 7\n"


def test_the_first_to_fail_is_not_one_that_lost_another():
    # all that had ended by one look at them: whoever lost another one was not the first
    found = runpy.run_path(str(SCRIPT))["watch"]([Ended(3), Ended(None), Ended(-9)])
    assert found == (2, -9)


class Ended:
    """A process that has ended with a code, or not."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_ctrl_c_and_a_stopped_script_end_all(number, code):
    command = ("--processes", "2", "--devices-per-process", "1", "--grace", "1", "--")
    sleep = "import os, time; os.write(1, b'up' + bytes([10])); time.sleep(60)"
    launched = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, sys.executable, "-c", sleep], stdout=subprocess.PIPE, text=True
    )
    assert [launched.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    launched.send_signal(number)  # to the script alone: it must end the others itself
    assert launched.wait(20) == code
    assert launched.stdout.read() == ""  # which their deaths close


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command: give it after --"),
        (["--processes", "2", "--", "x"], "--devices-per-process: must be given"),
        (["--processes", "0", "--", "x", "--cpu-devices=2"], "--processes = 0: must be at least 1"),
        (["--nodes", "2", "--", "x"], "--nodes: must come with --coordinator"),
        (["--nodes", "2", "--node", "2", "--coordinator", "a:1", "--", "x"], "--node = 2: must be within 0..1"),
        (["--", "/no/such/program"], "/no/such/program"),
    ],
)
def test_bad_usage(argv, message):
    done = launch(*argv)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
