"""What may be edited, an adapter or the whole model, and what that means for each step of a method."""
