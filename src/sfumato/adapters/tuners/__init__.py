"""The kinds of adapter that are trained, one file for kinds that share their factors."""
