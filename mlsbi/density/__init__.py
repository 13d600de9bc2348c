r"""Conditional densities: standardisation, splines, flows."""
