"""Everything that is computed once, before the first step: crops, latents, text embeddings, batches."""
