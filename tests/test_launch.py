"""scripts/launch.py: what each process is told, who ends when one fails, how hosts are reached."""

import json
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


def test_hosts_are_reached_by_the_command_that_was_given(tmp_path):
    ssh = tmp_path / "fake ssh.sh"
    ssh.write_text('echo "$1" >> "$(dirname "$0")/hosts"; shift; cd /; exec sh -c "$1"\n')
    folder = tmp_path / "work here"
    folder.mkdir()
    where = "import os; os.write(1, (os.getcwd() + chr(10)).encode())"
    done = launch("--hosts", "a,b", "--ssh", f"sh '{ssh}'", "--", sys.executable, "-c", where, cwd=folder)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(folder)] * 2
    assert sorted((tmp_path / "hosts").read_text().split()) == ["a", "b"]


FAIL = "import sys, time; number = sys.argv[sys.argv.index('--process-id') + 1]; time.sleep(60 if number == '0' else 0)"


def test_when_one_fails_all_end():
    begun = time.monotonic()
    program = f"{FAIL}; sys.exit(7)"
    command = ("--processes", "2", "--devices-per-process", "1", "--grace", "1", "--", sys.executable, "-c", program)
    done = launch(*command)
    assert done.returncode == 7 and time.monotonic() - begun < 20
    assert done.stderr == "launch.py: process 1 ended first, with status 7\n"


def test_ctrl_c_ends_all():
    command = ("--processes", "2", "--devices-per-process", "1", "--grace", "1", "--")
    sleep = "import os, time; os.write(1, b'up' + bytes([10])); time.sleep(60)"
    launched = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, sys.executable, "-c", sleep], stdout=subprocess.PIPE, text=True
    )
    assert [launched.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    launched.send_signal(signal.SIGINT)  # to the script alone: it must end the others itself
    assert launched.wait(20) == 130
    assert launched.stdout.read() == ""  # which their deaths close


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command: give it after --"),
        (["--processes", "2", "--", "x"], "--devices-per-process: must be given"),
        (["--processes", "0", "--", "x"], "--processes = 0: must be at least 1"),
        (["--nodes", "2", "--", "x"], "--nodes: must come with --coordinator"),
        (["--nodes", "2", "--node", "2", "--coordinator", "a:1", "--", "x"], "--node = 2: must be within 0..1"),
        (["--", "/no/such/program"], "/no/such/program"),
    ],
)
def test_bad_usage(argv, message):
    done = launch(*argv)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
