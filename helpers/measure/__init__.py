"""What a model writes, and what that says: attack success, utility."""
