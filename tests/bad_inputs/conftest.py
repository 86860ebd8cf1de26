"""One way to look at a refusal: the exit code, no traceback, and one message that says what has to be known."""

from collections.abc import Callable

import pytest

from qzo.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """refused(*arguments, says=[...], code=2) runs the command line and returns its message."""

    def check(*arguments: object, says: str | list[str], code: int = 2) -> str:
        capsys.readouterr()
        try:
            given = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own
            given = stop.code
        out, err = capsys.readouterr()
        assert given == code, err
        assert "Traceback" not in err and err.count(f"qzo {arguments[0]}: ") == 1
        message = err[err.index(f"qzo {arguments[0]}: ") :]
        for text in [says] if isinstance(says, str) else says:
            assert text in message, message
        assert len(message) < 700, message
        return message

    return check
