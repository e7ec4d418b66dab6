"""The one exception that means: the input is wrong, not the program."""


class UserError(Exception):
    """Bad input met before any work is lost: a recipe key, a file, a folder.

    Its message names the key or file, the value found, and what would be valid. The command line prints it
    without a traceback and exits with code 2.
    """


def explain(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of an error that is not a crash; None for one that is."""
    if isinstance(error, UserError):
        return str(error), 2
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else None
