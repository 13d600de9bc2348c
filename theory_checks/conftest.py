r"""Which examples the property tests draw: the same in every run, others each time, or many of them."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.register_profile("thorough", derandomize=False)  # ten times as many, see `testing.properties`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
