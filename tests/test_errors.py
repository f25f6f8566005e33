"""A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""

import pytest

import errors


def test_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise errors.UserError("no such preset 'x': choose demo or cpu")

    with pytest.raises(SystemExit) as stopped:
        errors.run(main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "error: no such preset 'x': choose demo or cpu\n"
    assert printed.out == ""


def test_result_and_other_exceptions_pass_through():
    assert errors.run(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 / 0)
