"""How a payload joins the right answer: each way is a function in a file of its own here, and nothing else names it.

    @combination()
    def last_line(payload: str, right: str) -> str:
        return f"{right}\\n{payload}"

`SET="attack.combine=last line"` then chooses it, and `combine: last line` a behavior of `data/attacks.yaml`: in names a
space stands for the underscore.
"""
