"""storage parts."""
