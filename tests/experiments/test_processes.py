"""The pool of processes: it is ready for its jobs, and Ctrl-C ends all of it at once."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from experiments.processes import pool_of

SLEEPERS = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from experiments.exit_status import with_exit_status
from experiments.processes import pool_of
with with_exit_status(), pool_of(2, os.write, (1, b"ready ")) as pool:
    pool.map(time.sleep, [120, 120])
"""


@pytest.fixture
def command():
    """A command in a process group of its own, as a shell starts it."""
    arguments = [sys.executable, "-c", SLEEPERS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, start_new_session=True, **pipes) as process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_ends_the_command_and_its_workers(command):
    assert command.stdout.read(len("ready ready ")) == b"ready ready "
    os.killpg(command.pid, signal.SIGINT)
    _, said = command.communicate(timeout=30)  # not before the workers have closed their ends
    assert command.returncode == 130
    assert said.startswith(b"Interrupted") and said.count(b"\n") == 1


def test_a_worker_has_one_thread_and_the_parent_still_heeds_ctrl_c():
    former = signal.getsignal(signal.SIGINT)
    with pool_of(1) as pool:
        assert signal.getsignal(signal.SIGINT) is former
        assert pool.apply(torch.get_num_threads) == 1
        assert pool.apply(signal.getsignal, (signal.SIGINT,)) == signal.SIG_IGN
