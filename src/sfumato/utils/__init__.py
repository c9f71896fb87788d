"""What every room uses and that knows nothing of models: text, files, processes, random numbers."""
