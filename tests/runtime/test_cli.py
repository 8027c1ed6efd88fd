"""How a program ends: its exit code, and what it prints, on rank 0 and on the others."""

import builtins
import errno
import sys
from unittest import mock

import pytest
import torch.distributed

from mora_ds.common import errors
from mora_ds.common.errors import Stopped, UserError
from mora_ds.runtime import cli, signals
from tests.helpers.tables import each_row, parsed


class Left(BaseException):
    """Raised in place of the end of the process."""


@pytest.fixture
def pauses(monkeypatch, unchanged_logger):
    """How long each error was held back."""

    def abort(code):
        raise Left(code)

    waits = []
    monkeypatch.setattr(cli, "exit_process", abort)
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(
        sys, "__stderr__", None
    )  # no handler of bus errors is left behind
    return waits


def code_of(error):
    with pytest.raises(Left) as left:
        cli.run(mock.Mock(side_effect=error))
    return left.value.args[0]


def shared(error):
    """An error as `Ranks` raises it, on all ranks at the same time."""
    error.is_shared = True
    return error


CLOSED = "[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242\nstack"
KINDS = {**vars(builtins), **vars(errors), **vars(torch.distributed)}
"""Kinds of exceptions by their names."""
ENDS = r"""
SystemExit | 0 | 0 | nothing
SystemExit | null | 0 | nothing
SystemExit | 3 | 3 | nothing
SystemExit | words | 1 | nothing
Stopped | stopped at step 3 | 75 | stopped at step 3
UserError | fix --seed | 2 | error: fix --seed
RunError | NaN loss | 1 | error: NaN loss
RuntimeError | "[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer\nstack" | 1 | lost contact
RuntimeError | "[/gloo/gloo/transport/tcp/pair.cc:488] Application timeout caused pair closure" | 1 | lost contact
RuntimeError | "[/gloo/gloo/transport/tcp/pair.cc:510] Read error [10.0.0.2]:42: Connection reset" | 1 | lost contact
RuntimeError | "[/gloo/gloo/transport/tcp/pair.cc:366] writev [10.0.0.2]:42: No route to host" | 1 | lost contact
RuntimeError | "[gloo/transport/b.cc:81] Timed out waiting 9ms" | 1 | lost contact with another rank (unknown), which
RuntimeError | "Gloo connectFullMesh failed with [/gloo/gloo/transport/tcp/pair.cc:144] no error" | 1 | lost contact
DistNetworkError | The client socket has timed out after 600000ms | 1 | lost contact
DistStoreError | "wait timeout after 20000ms, keys: /default_pg/0" | 1 | lost contact
DistNetworkError | "code: -98, name: EADDRINUSE, message: address already in use" | 1 | Traceback
RuntimeError | "[/pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] Unable to find address" | 1 | Traceback
RunError | Broken pipe | 1 | error: Broken pipe
RuntimeError | of torch | 1 | Traceback
KeyError | name | 1 | Traceback
"""
"""How a program ends, its message, the exit code, and what is printed."""


@each_row("kind, message, code, expected", ENDS)
def test_the_code_and_the_message_of_each_end(
    capsys, pauses, kind, message, code, expected
):
    assert code_of(KINDS[kind](parsed(message))) == int(code)
    text = capsys.readouterr().err
    assert expected in text if text else expected == "nothing"
    assert ("Traceback" in text) == (expected == "Traceback"), (
        "what is expected has no traceback"
    )
    assert "stack" not in text
    assert bool(pauses) == ("lost contact" in expected), (
        "the launcher is to see the other's code"
    )


def test_other_ranks_delay_their_message_and_name_their_rank(
    capsys, pauses, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert code_of(UserError("mine")) == 2
    assert code_of(shared(UserError("of all"))) == 2
    of_one, of_all = pauses
    assert of_one > of_all > 0, "the launcher must see rank 0 end first"
    assert code_of(Stopped("requested by rank 0")) == 75
    assert capsys.readouterr().err == "[rank 1] error: mine\n[rank 1] error: of all\n"


def test_signals_have_their_own_effect_while_an_error_is_held_back(pauses, monkeypatch):
    """The launcher ends a rank that only waits to repeat rank 0's message."""
    uninstall = mock.Mock()
    monkeypatch.setattr(signals, "uninstall", uninstall)
    assert code_of(UserError("mine")) == 2
    uninstall.assert_called_once_with()


def test_a_rank_that_was_asked_to_stop_while_another_one_left_has_stopped(
    capsys, pauses, monkeypatch
):
    """Python raises in the main thread when the collective has returned, which is when its
    failure is handled.
    """

    stopped = Stopped("stopped by SIGTERM with nothing to save")
    monkeypatch.setattr(signals, "uninstall", mock.Mock(side_effect=stopped))
    assert code_of(RuntimeError(CLOSED)) == 75
    assert not pauses
    assert capsys.readouterr().err == "stopped by SIGTERM with nothing to save\n"


def test_an_empty_word_is_refused_with_its_flag_before_the_program_runs(
    pauses, monkeypatch, capsys
):
    words = ["mora-ds export", "--checkpoint", "out", "--output", "", "--device="]
    monkeypatch.setattr(sys, "argv", words)
    assert code_of(AssertionError("the program ran")) == 2
    stderr = capsys.readouterr().err
    assert "--output must not be empty" in stderr
    assert "--device must not be empty" in stderr


def test_a_name_that_is_not_read_as_utf_8_is_refused(capsys, pauses, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mora-ds", "r\udcc3\udcbcn/out", "ü"])
    assert code_of(AssertionError("the program ran")) == 2
    message = "is not UTF-8, or the locale is not: rename it, or set LC_ALL=C.UTF-8"
    assert capsys.readouterr().err == f"error: rün/out {message}\n"


def test_a_result_that_cannot_be_printed_is_a_failure(monkeypatch):
    full = mock.Mock()
    full.flush.side_effect = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(errors.RunError, match="stdout cannot be written: No space"):
        cli.say("a", "b")
    assert full.write.call_args_list == [mock.call(text) for text in "a\nb\n"]


def test_columns_of_a_table_are_as_wide_as_their_longest_cell():
    assert cli.table([["name", "n"], ["a", "1000"]]) == ["name     n", "   a  1000"]
