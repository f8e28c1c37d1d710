"""Signals that ask a run to stop, in processes that really get them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from hpdist.train.guard import RunGuard


def outcome(function: Callable[[], bool]) -> int:
    """How a process ends in which a function is called: 0 where it says yes."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if function() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def signalled(*numbers: signal.Signals) -> bool:
    guard = RunGuard(0, None)
    with guard:
        for number in numbers:
            os.kill(os.getpid(), number)
        return guard.received == numbers[0].name and guard.stopping()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_the_first_signal_is_noted(number: str) -> None:
    assert outcome(lambda: signalled(signal.Signals[number])) == 0


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    assert outcome(lambda: signalled(signal.SIGINT, signal.SIGINT)) == -signal.SIGINT


def test_torchrun_hands_a_second_ctrl_c_on_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert outcome(lambda: signalled(*numbers) or True) == 0  # it goes on, to be saved
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert outcome(lambda: signalled(*numbers)) == -signal.SIGTERM
    assert outcome(lambda: signalled(signal.SIGTERM, signal.SIGTERM)) == 0


def test_a_second_ctrl_c_interrupts_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)

    def interrupted() -> bool:
        try:
            signalled(signal.SIGINT, signal.SIGINT)
        except KeyboardInterrupt:
            return True
        return False

    assert outcome(interrupted) == 0


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it, and a shell's background job."""

    def unheard() -> bool:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        guard = RunGuard(0, None)
        with guard:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), number)
            return guard.received is None

    assert outcome(unheard) == 0


def test_a_scheduler_is_heard_though_the_launcher_ignores_its_signals() -> None:
    """As `launch/slurm.sbatch` starts it: what a launcher ignores, its children ignore too."""

    def heard() -> bool:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return signalled(signal.SIGUSR1)

    assert outcome(heard) == 0
