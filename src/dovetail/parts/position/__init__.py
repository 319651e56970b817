"""position parts."""
