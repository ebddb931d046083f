"""Pure tensor code: attention and resizing."""
