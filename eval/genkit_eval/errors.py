"""The one error a user sees as a line of text."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave does not work: ``option`` is what to change, the message says what came and what would work.

    ``code`` is the exit code of the command.
    """

    def __init__(self, option: str, message: str, code: int = 2) -> None:
        super().__init__(f"{option}: {message}")
        self.option, self.code = option, code
