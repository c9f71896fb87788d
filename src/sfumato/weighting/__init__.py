"""What a user says of an adapter: its file, its weight, by block or not, and its modules. Imports no torch."""
