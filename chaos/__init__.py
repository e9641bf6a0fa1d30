"""Tests apoq under faults, one at a time, with real servers, processes and signals."""
