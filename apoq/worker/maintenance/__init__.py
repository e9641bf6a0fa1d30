"""Deletes old tasks, and finds what was missed."""
