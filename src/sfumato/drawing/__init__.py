"""Pictures out of a pipeline or a base, and what their files say."""
