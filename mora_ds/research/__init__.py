"""Features that papers on MoRA and ReMoRA describe, but that our measurements do not
recommend or that few users need.

settings, run     the `research:` block of a recipe, and its hooks in a run (`train.hooks`)
analyze           ranks of frozen weights, and target plans for a budget (`mora-ds analyze`)
targets           target plans: the layers that get a MoRA matrix, and the matrix sizes
bank              many adapters of one base, with one per sequence of a batch (`mora-ds evaluate-adapters`)
spectrum          singular values and ranks of merged updates (`mora-ds spectrum`)

No other package imports these modules: `mora_ds.common.research` loads one when its
command or a `research:` block needs it.
"""
