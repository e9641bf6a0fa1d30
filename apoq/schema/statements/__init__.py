"""Every statement that apoq sends: one function each, which returns a Core expression.

The statements can be printed, explained and tested by themselves. Each function takes the schema of the
tables (None for the connection's default); values that differ from call to call are bound parameters.
"""
