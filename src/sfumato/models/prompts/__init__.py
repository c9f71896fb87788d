"""Prompts as people write them: weighted words, words that change between the steps, any length."""
