"""Programs that train: one file for each method, with the training loop in full view. `sfumato cp NAME FILE` copies
one."""
