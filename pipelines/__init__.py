"""Programs that generate images, and programs that look into files."""
