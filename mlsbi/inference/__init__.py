r"""Estimators and posteriors."""
