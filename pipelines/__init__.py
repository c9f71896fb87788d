"""Programs that draw and look."""
