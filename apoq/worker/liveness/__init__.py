"""Shows that this worker lives, and sees when others don't."""
