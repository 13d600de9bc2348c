r"""Simulations on disk: nothing that was computed is lost or silently changed."""
