"""Writes what became of tasks."""
