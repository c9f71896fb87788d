"""New words: their spelling, their rows beside the frozen embedding table, and how a tokenizer knows them."""
