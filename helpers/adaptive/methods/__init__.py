"""How attackers who know a defense plant: methods as those in `helpers/attacks/methods/`, and named in the same way."""
