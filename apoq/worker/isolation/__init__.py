"""Runs isolated tasks in child processes."""
