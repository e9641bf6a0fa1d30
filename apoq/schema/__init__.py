"""The tables in the database, and all statements on them."""
