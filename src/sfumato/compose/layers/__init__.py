"""What a mix does to one layer: sums the changes into its weight, or adds a path beside it."""
