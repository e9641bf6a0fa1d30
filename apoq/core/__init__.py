"""Plain Python, without a database: states, options, retries and the outcome of an attempt."""
