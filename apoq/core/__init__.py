"""Plain Python: what a task, a retry or an option is. No database."""
