"""The loss and what goes into it: noise, prior preservation, crossed samples, validation."""
