r"""The telescoping objective and the loop that minimises it."""
