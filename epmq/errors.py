"""The exceptions of this package: one small tree, a class per kind of cause.

Every message is one sentence that names the file, tensor, task or key at fault and what to do.
"""

# A message carries names from files; a name may be a page long.
LONGEST_MESSAGE = 4_000


class EpmqError(Exception):
    """Base of everything this package raises on purpose."""

    def __str__(self) -> str:
        """One line of printable signs: what a name from a file could break or colour is escaped."""
        text = super().__str__()
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class ConfigError(EpmqError, ValueError):
    """A setting or a recipe that cannot be used."""


class SourceError(EpmqError):
    """A checkpoint, shard or tensor that cannot be read or does not fit the others."""


class ChangedError(SourceError):
    """A file that was changed or vanished while it was in use."""


class CalibrationError(EpmqError):
    """Calibration data that is missing, empty, or does not fit the experts."""


class NumericalError(EpmqError):
    """NaN, Inf, or a Hessian that no allowed damping makes positive definite."""


class ModelError(EpmqError):
    """A model in which the parts this package works on cannot be found."""


class FormatError(EpmqError):
    """A quantized checkpoint that is truncated, foreign or contradicts itself."""


class OutputError(EpmqError):
    """An output folder that cannot be written."""


class ProcessError(EpmqError):
    """Another process of the same run that ended or no longer answers."""


class ExtensionError(EpmqError, ImportError):
    """A compiled extension that is there but cannot be loaded."""
