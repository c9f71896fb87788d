"""Prompts as people write them: tags, weighted words, words that change between the steps, any length."""
