"""New words: their vectors, how tokenizers know them, how they are spelt, and what a word means already."""
