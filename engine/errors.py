"""The one family of exceptions. Each says what was found, what was expected and what to do."""


class SvdEngineError(Exception):
    """Base of every error that svdengine raises on purpose; the command line prints it as one line."""


class ModelFileError(SvdEngineError):
    """A model file is damaged, truncated, or not what its header says."""


class ConversionError(SvdEngineError):
    """A checkpoint cannot be converted."""


class RequestError(SvdEngineError):
    """A prompt, a message list or a sampling parameter cannot be used."""


class GrammarError(RequestError):
    """A grammar or JSON schema is not valid, asks for what is not supported, or takes too much time.

    schema: which of the schemas of `Grammar.schemas` is at fault; None: not known, or the grammar itself.
    """

    def __init__(self, message: str, schema: int | None = None) -> None:
        super().__init__(message)
        self.schema = schema


class ContextOverflowError(RequestError):
    """A sequence does not fit the context or the KV pool."""


class QueueFullError(SvdEngineError):
    """As many requests as were allowed are running or waiting; the same one may be taken later."""


class ShutdownError(SvdEngineError):
    """The program is ending and takes no more requests, or cut one short."""


class DeviceError(SvdEngineError):
    """A device or an instruction set that was asked for is not there."""


def quoted(name: str) -> str:
    """A name from a file, safe to print: escaped, and cut when it is long."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


def shown(value: object) -> str:
    """Any value that was found, safe to print: cut when it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4,300 digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"some {type(value).__name__}"
    return text if len(text) <= 100 else text[:100] + "..."
