"""The model card: the README.md beside what was trained."""
