"""Merging adapters into one: plain functions on deltas and on low-rank factors, and what they say of files.

    factors         up down: concatenation, truncation through QR, factoring a dense delta
    methods         the methods by name, for one module: weighted sum, TIES, DARE, KnOTS, NP-LoRA
    sources         the adapters of a merge, out of their files, and what the result says of itself
    merge           whole adapters
    bake            into a checkpoint or a diffusers folder
    extract         an adapter out of two models, a smaller one out of a larger, another format
    model_weights   the weights of a base as they lie in its files
    whole_model     a model as an adapter
    overlap         what clashes, before anything is drawn, and that as a picture

Randomness is handed in as a generator. Importing this package loads no torch.
"""
