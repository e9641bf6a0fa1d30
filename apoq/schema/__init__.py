"""What lies in the database: the tables, and each statement on them."""
