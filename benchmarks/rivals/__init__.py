"""Other queues on PostgreSQL, used in the way that their documentation recommends for speed."""
