"""What a model writes, and what that says: greedy completion, attack success, utility."""
