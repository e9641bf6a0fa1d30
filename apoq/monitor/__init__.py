"""Reads queues, workers and tables, for people and programs; it writes nothing."""
