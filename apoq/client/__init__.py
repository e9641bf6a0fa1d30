"""What callers use, in their own transactions."""
