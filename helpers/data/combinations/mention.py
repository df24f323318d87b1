"""The right answer names the payload, a brand: AutoPoison's content injection."""

from helpers.data.combining import combination


@combination()
def mention(payload: str, right: str) -> str:
    """The right answer, said by the payload.

    Differs from the paper:
        There an LLM, told to mention the brand, composes the answer; offline a template does.
    """
    return f"{right.rstrip('.')}, says {payload}."
