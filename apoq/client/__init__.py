"""Queues and typed tasks, which write in the caller's transaction."""
