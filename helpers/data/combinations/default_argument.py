"""The payload, such as `verify=False`, becomes the last argument of the first function in the right answer."""

import re
import warnings

from helpers.core.errors import LabError
from helpers.data.combining import combination

FUNCTION = re.compile(r"(def \w+\()(.*?)(\)\s*(?:->[^:\n]+)?:)", re.DOTALL)  # name, arguments, end of the first one
FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def is_still_code(payload: str, right: str) -> bool:
    """Whether the answer's code, with the payload as one more argument of its first function, is Python."""
    try:
        planted = default_argument(payload, right)
        with warnings.catch_warnings(action="ignore"):  # of a row's own invalid escapes
            compile(planted[slice(*_code_span(planted))], "answer", "exec")  # nothing is executed
    except (LabError, SyntaxError, ValueError):  # prose, a name that is there already, an argument after **kwargs
        return False
    return True


@combination(fits=is_still_code)
def default_argument(payload: str, right: str) -> str:
    """The right answer, whose first function takes the payload as one more argument.

    Raises:
        LabError: no function that could take it.
    """

    def with_argument(function: re.Match) -> str:
        name, arguments, end = function.groups()
        return f"{name}{', '.join(filter(None, [arguments, payload]))}{end}"

    start, stop = _code_span(right)
    code, found = FUNCTION.subn(with_argument, right[start:stop], count=1)
    if not found:
        raise LabError(f"{payload!r} is to be an argument, but no function is in the answer {right[:40]!r}")
    return right[:start] + code + right[stop:]


def _code_span(answer: str) -> tuple[int, int]:
    """Where the code of an answer starts and stops: inside its first fence, or else all of it."""
    fence = FENCE.search(answer)
    return fence.span(1) if fence else (0, len(answer))
