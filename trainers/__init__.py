"""Programs that train, one file a method, the loop in full view. `sfumato cp NAME FILE` copies one."""
