"""How the embedded base `pocket` is trained from scratch."""
