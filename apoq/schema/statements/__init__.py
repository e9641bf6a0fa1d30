"""Every statement that apoq sends: one function each, which returns a Core expression.

They can be printed, explained and tested by themselves. Each takes the schema of the tables (None for the
connection's own); what varies from call to call is a bound parameter.
"""
