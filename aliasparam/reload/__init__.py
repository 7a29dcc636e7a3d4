"""Reload: where new weights come from, what was changed, and how many ranks agree on it."""
