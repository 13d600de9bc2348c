r"""Drawing, coupling and running simulations."""
