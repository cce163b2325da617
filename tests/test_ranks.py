"""Ranks notice another one that failed, ended or stopped answering, and end with a message."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from tests.helpers import on_ranks

from loadstone import ranks as module
from loadstone.errors import MissingError, UsageError
from loadstone.ranks import Ranks, joined


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT", 0.1)
    monkeypatch.setattr(module, "_GONE", 2.0)


def compute() -> None:
    time.sleep(60)


def exchange() -> None:
    Ranks(0, 3).gather(None)


def on_three(last: Callable[[], None], others: Callable[[], None]) -> list[int]:
    """Exit codes of three ranks, of which the last does something else."""

    def work() -> None:
        with joined() as ranks:
            ranks.wait()
            last() if ranks.rank == 2 else others()

    return on_ranks(3, work, check=False)


def fail() -> None:
    raise UsageError("the option is wrong", "Leave it out")


@pytest.mark.parametrize("others", [compute, exchange])
def test_a_rank_that_fails_says_so_to_all(others: Callable[[], None], capfd: pytest.CaptureFixture) -> None:
    begun = time.monotonic()
    codes = on_three(fail, others)
    assert time.monotonic() - begun < 20
    err = capfd.readouterr().err
    # One that computes is ended, one that exchanges raises.
    assert codes == ([5, 5, 1] if others is compute else [1, 1, 1])
    assert "rank 2 on" in err and "failed: the option is wrong" in err
    assert err.count("Run the same command again") >= 2


@pytest.mark.parametrize(
    ("how", "others"),
    [
        (signal.SIGKILL, exchange),
        (signal.SIGSTOP, compute),
        pytest.param(signal.SIGKILL, compute, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, exchange, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_ends_the_job(
    how: signal.Signals, others: Callable[[], None], capfd: pytest.CaptureFixture
) -> None:
    """A stopped process stands for a machine that is gone: its connections stay open."""
    begun = time.monotonic()
    codes = on_three(lambda: os.kill(os.getpid(), how), others)
    assert time.monotonic() - begun < 20
    assert codes[2] == -signal.SIGKILL
    err = capfd.readouterr().err
    assert codes[:2] in ([5, 5], [1, 1], [1, 5], [5, 1])
    assert err.count("Run the same command again") >= 2
    assert "rank 2 has not answered" in err or "has stopped" in err or "has lost another rank" in err


def test_the_first_rank_may_be_the_one_that_is_gone(capfd: pytest.CaptureFixture) -> None:
    """It holds the store, where no launcher does."""

    def work() -> None:
        with joined() as ranks:
            ranks.wait()
            os.kill(os.getpid(), signal.SIGSTOP) if ranks.rank == 0 else compute()

    codes = on_ranks(3, work, check=False)
    assert codes == [-signal.SIGKILL, 5, 5]
    assert "the first node of this job has not answered" in capfd.readouterr().err


def test_ranks_that_end_at_different_times() -> None:
    def work() -> None:
        for _ in range(2):
            with joined() as ranks:
                time.sleep(ranks.rank * 0.2)
        with pytest.raises(MissingError), joined() as ranks:
            raise MissingError("each by itself")

    on_ranks(3, work)


def test_a_script_calls_again_and_again_under_a_launcher() -> None:
    """The launcher's store outlives each group, with the addresses of its ranks."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work() -> None:
        os.environ.update(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
        for number in range(20):
            with joined() as ranks:
                assert ranks.gather(number) == [number] * 2
            time.sleep(0.02 * (number + ranks.rank) % 0.05)

    on_ranks(2, work)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is ''"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR ''"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}, "RANK 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_variables_that_no_launcher_sets(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says) as refused, joined():
        pass
    assert "torchrun" in str(refused.value)
