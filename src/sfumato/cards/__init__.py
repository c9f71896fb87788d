"""The README.md beside what is learned, in the form the Hugging Face hub shows."""
