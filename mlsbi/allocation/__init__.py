r"""How many runs of each level a budget should buy: pilot runs, optimal sizes, adaptive refinement."""
