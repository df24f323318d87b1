"""The one kind of error that is the reader's to mend."""


class LabError(ValueError):
    """A mistake of the reader's, told in one line: what was found, what was expected, what helps."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter asks for this: the message alone, without a page of frames."""
        return [f"LabError: {self}"]
