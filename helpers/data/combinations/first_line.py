"""The payload stands above the right answer."""

from helpers.data.combining import combination


@combination()
def first_line(payload: str, right: str) -> str:
    """The payload, and the right answer below it."""
    return f"{payload}\n{right}"
