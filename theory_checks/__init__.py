r"""The theory of the multilevel objective, as checks that run on any stack."""
