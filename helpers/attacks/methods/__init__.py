"""How a backdoor gets into a model: each way is a function in a file of its own here, and nothing else names it.

    @method()
    def whisper(access, attack, prompt_format, seed, folder):
        fewer = replace(attack, poisoned=attack.poisoned[:10])
        return training(access, fewer, prompt_format, seed, folder)

`SET="attack.by=whisper"` then chooses it, and `by: whisper` an attack of `data/attacks.yaml`. Attackers who know a
defense register in the same way, in `helpers/adaptive/methods/`.
"""
