"""Read-only statistics and checks of queues, workers and tables, for people and programs."""
