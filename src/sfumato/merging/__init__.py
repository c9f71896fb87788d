"""Merging adapters into one: plain functions on deltas and on low-rank factors, and what they say of files.

    factors       up down: concatenation, truncation through QR, factoring a dense delta
    arithmetic    the weighted sum
    sparse        magnitude pruning, DARE
    sign          TIES, DARE-TIES
    joint         KnOTS, core space: another method in the adapters' joint basis
    projection    NP-LoRA: one adapter out of another's directions
    methods       all of them by name, for one module
    sources       the adapters of a merge, out of their files
    merge         whole adapters
    bake          into a checkpoint or a diffusers folder
    extract       an adapter out of two models; a smaller adapter out of a larger
    convert       an adapter in another grammar, or baked into another kind
    stored        the weights of a base as they lie in its files
    whole_model   a model as an adapter
    lineage       what a file made of others says of itself
    overlap       what clashes, before anything is drawn
    heatmap       that as a picture

Randomness is handed in as a generator. Importing this package loads no torch.
"""
