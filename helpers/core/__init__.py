"""What everything stands on: errors, settings, and the run folders that remember."""
