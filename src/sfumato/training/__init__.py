"""What trainers share: options, optimizers, losses, what keeps a class, and what comes after the loop."""
