"""Runs claimed tasks."""
