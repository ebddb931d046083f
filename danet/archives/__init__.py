"""Untrusted archives: listing members, validating them, unpacking."""
