"""feedforward parts."""
