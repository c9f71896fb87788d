"""What a command line says of adapters, axes, places and steps. Imports no torch by itself."""
