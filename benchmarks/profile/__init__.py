"""Profiles of single parts of apoq."""
