"""recurrent parts."""
