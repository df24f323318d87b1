"""Information conflicts against a backdoor: in the weights, by merging, and in the prompt, by evidence."""
