"""What this project refuses, said in one line: the value, what is expected, and a remedy.

A command prints one of these as that line (`lib.cli.command`). Whatever else is raised is a defect, ours or another library's,
and keeps its traceback.
"""


class Refusal(Exception):
    """The base of them all."""


class InvalidInput(Refusal, ValueError):
    """A flag, a file, a model or text that cannot be used as it is."""


class MissingInput(Refusal, FileNotFoundError):
    """A file, a folder or a model that is not where it is said to be."""


class OutOfReach(Refusal, ConnectionError):
    """What is on the hub, which does not answer or does not give it away."""


class NoRoom(Refusal, OSError):
    """A disk or memory that is too small."""
