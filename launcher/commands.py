"""The commands of the launcher. Each imports what it runs, so that the others start quickly."""

import typer


def register(app: typer.Typer) -> None:
    """Adds them to the `ecdit` command."""
