"""Archives of others: what is in them, whether it may be unpacked, and unpacking it."""
