"""Everything a user can get wrong, as one family of exceptions."""

from __future__ import annotations


class DiffLoRAError(Exception):
    """A user's mistake or a bad input, told in one sentence; `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class NoFaceFound(DiffLoRAError):
    """No usable face in a photo."""


class BadImage(DiffLoRAError):
    """A picture that cannot be read or used."""


class BadLoraFile(DiffLoRAError):
    """A LoRA file that cannot be read, or holds something other than a plain LoRA."""


class BadWeightsFile(DiffLoRAError):
    """A weights file that cannot be read or written."""


class LayoutMismatch(DiffLoRAError):
    """Two things made for different base models or LoRA spaces."""


class BadConfig(DiffLoRAError):
    """A setting that does not exist or has an impossible value."""
