"""The exit status of a command or a worker says what kind of error ended it."""

import pytest

from layerwise.runtime.errors import Diverged, Failure, InputError, record_failure, report_errors


@pytest.mark.parametrize(("kind", "status"), [(InputError, 2), (Failure, 1), (Diverged, 1)])
def test_bad_input_is_status_two_and_what_fails_on_good_input_one(kind, status, tmp_path, capsys):
    def ended_by_it(argv: list[str]) -> None:
        raise kind("It is told.")

    def in_a_cell(argv: list[str]) -> None:
        with record_failure(tmp_path, "compress"):
            ended_by_it(argv)

    for job, end in ((ended_by_it, ""), (in_a_cell, f" (details: {tmp_path / 'failed-compress.json'})")):
        with pytest.raises(SystemExit) as ended:
            report_errors(job, [])
        assert ended.value.code == status and capsys.readouterr().err == f"error: It is told.{end}\n"


def test_a_disk_error_or_a_bug_makes_a_cell_fail(tmp_path):
    for error in (OSError(28, "No space left on device"), ZeroDivisionError("division by zero")):
        with pytest.raises(Failure), record_failure(tmp_path, "compress"):
            raise error
