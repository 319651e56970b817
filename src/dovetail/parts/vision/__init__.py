"""vision parts."""
