"""Other queues on PostgreSQL, used as their own documentation says is quickest."""
