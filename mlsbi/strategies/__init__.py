r"""Ways to use the levels of a data set, one file each."""
