"""Exceptions that cost no import of torch."""


class Ended(Exception):
    """What a thread ends its process for, where there is no exception to be caught: a hang."""
