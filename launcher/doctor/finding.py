"""What a check says: one line of the doctor's table."""

from dataclasses import dataclass

OK, MISSING, WARNING, BROKEN = "ok", "missing", "warning", "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked for, its state, what was found, and what the lack of it costs or what to do."""

    name: str
    state: str
    found: str
    costs: str = ""
