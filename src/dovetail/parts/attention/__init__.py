"""attention parts."""
