"""The defenses: each is a function in a file of its own here, and nothing else names it.

    @defense(assumes=("clean rows", "weights"), trains=("recover",))
    def half_recovered(access, suspicious, defender, prompt_format, seed, folder):
        fewer = replace(defender, recovery=defender.recovery[::2])
        return finetuning(access, suspicious, fewer, prompt_format, seed, folder)

`find_defense("half_recovered")` then gives it, and its `traits.assumes` says what it takes for granted. The purified
model goes to `model` inside of `folder`.
"""
