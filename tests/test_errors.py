"""A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""

import contextlib
import dataclasses
import errno
import io

import pytest

from booster_soccer import errors


@dataclasses.dataclass(frozen=True)
class Inner:
    fallen: float = -1.0


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    discount: float = 0.5
    share: tuple[float, float] = (0.5, 0.5)
    steps: int | None = None
    weights: Inner = Inner()


def said(capsys, main, *args) -> str:
    with pytest.raises(SystemExit) as stopped:
        errors.run(main, *args)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def raiser(error: BaseException):
    def main(*_):
        raise error

    return main


def test_user_error_is_one_line_and_status_2(capsys):
    error = errors.UserError("no such preset 'x': choose demo or cpu")
    assert said(capsys, raiser(error)) == "error: no such preset 'x': choose demo or cpu\n"
    assert said(capsys, raiser(errors.UserError("runs/a\nb is not there"))) == "error: runs/a b is not there\n"


def test_what_the_machine_refuses_is_one_line(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a.metrics.jsonl")
    line = said(capsys, raiser(full))
    assert "cannot use runs/a.metrics.jsonl: No space left on device; free space" in line
    assert line.endswith("; more: docs/01-environment-setup.md#disk-full\n")
    line = said(capsys, raiser(MemoryError("Unable to allocate 8 PiB")))
    assert "not enough memory" in line and line.endswith("; more: docs/02-mjx-training.md#out-of-memory\n")


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (Config(discount=float("nan")), "--discount cannot be nan"),
        (Config(share=(0.5, float("inf"))), "--share cannot be inf"),
        (Config(weights=Inner(float("-inf"))), "--fallen cannot be -inf"),
        (Config(seed=2**62), "--seed has more digits"),
        (Config(steps=-(10**5000)), "--steps has more digits"),
    ],
)
def test_numbers_that_are_none_are_refused_before_anything_runs(capsys, config, flag):
    assert flag in said(capsys, lambda _: pytest.fail("it ran"), config)


def test_result_and_other_exceptions_pass_through():
    assert errors.run(lambda a, b: a + b, 2, 3) == 5
    assert errors.run(lambda config: config.seed, Config()) == 0
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 / 0)


def test_a_message_that_quotes_half_a_character_can_be_printed():
    error = errors.UserError("the file names preset = \ud800: name another")
    assert str(error).encode() == b"the file names preset = \\ud800: name another"


def test_a_notebook_shows_the_same_line():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    code = "from booster_soccer.errors import UserError\nraise UserError('no such preset: choose demo')"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        shell.run_cell(code)
    assert shown.getvalue() == "error: no such preset: choose demo\n"
