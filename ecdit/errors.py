"""The one exception that means: the input is wrong, not the program."""


class UserError(Exception):
    """Bad input met before any work is lost: a recipe key, a file, a folder.

    Its message names the key or file, the value found, and what would be valid. The command line prints it
    without a traceback and exits with code 2.
    """
