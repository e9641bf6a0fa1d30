"""Connections to PostgreSQL and statements on them; nothing here knows about tasks."""
