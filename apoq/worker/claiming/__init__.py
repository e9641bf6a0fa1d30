"""Takes due tasks from the database."""
