import errno
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from mlsbi.store import locking
from mlsbi.store.locking import LockHeldError, find_holder, locked

HOLD = """
import sys
from mlsbi.store.locking import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `tmp_path / "lock"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_first_ones_name(tmp_path, holder):
    with pytest.raises(LockHeldError, match=f"process {holder.pid} on .* since 20"), locked(tmp_path / "lock"):
        pass
    assert find_holder(tmp_path / "lock").pid == holder.pid


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid  # the file tells nothing
    assert find_holder(tmp_path / "lock") is None
    with locked(tmp_path / "lock") as kept_apart:
        assert kept_apart


def test_a_second_thread_is_refused(tmp_path):
    refused = []

    def take():
        try:
            with locked(tmp_path / "lock"):
                pass
        except LockHeldError as error:
            refused.append(error.holder.pid)

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert refused == [os.getpid()]
    take()
    assert len(refused) == 1


def try_elsewhere(path) -> str:
    code = "import sys\nfrom mlsbi.store.locking import locked\nwith locked(sys.argv[1]): print('taken')"
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True).stdout.strip()


def test_looking_and_trying_do_not_release_the_lock(tmp_path):
    with locked(tmp_path / "lock"):
        assert find_holder(tmp_path / "lock").pid == os.getpid()
        with pytest.raises(LockHeldError), locked(tmp_path / "lock"):
            pass
        assert try_elsewhere(tmp_path / "lock") == ""
    assert try_elsewhere(tmp_path / "lock") == "taken"


def test_a_forked_child_does_not_hold_the_lock_and_cannot_release_it(tmp_path):
    context = locked(tmp_path / "lock")
    with context:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path / "lock"):
                    pass
            except LockHeldError:
                context.__exit__(None, None, None)
                os._exit(17)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        assert try_elsewhere(tmp_path / "lock") == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locking.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="two writers would not be kept apart"), locked(tmp_path / "lock") as kept:
        assert kept is False
    assert find_holder(tmp_path / "lock") is None


def test_a_system_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "fcntl", None)
    with pytest.warns(UserWarning, match="this system has no file locks"), locked(tmp_path / "lock") as kept:
        assert kept is False
