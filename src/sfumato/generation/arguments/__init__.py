"""What `generate` and `grid` read from the command line."""
