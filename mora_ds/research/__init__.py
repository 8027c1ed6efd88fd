"""Features that papers on MoRA and ReMoRA describe, but that our measurements do not
recommend or that few users need.

analyze           ranks of frozen weights, and target plans for a budget (`mora-ds analyze`)
targets           target plans: which layers get a MoRA matrix, of what size; the block `research:` of a recipe
subspace          the adapter `subspace`: MoRA matrices between singular vectors of the frozen weights
gradient_sides    sides of `subspace` from the gradient: the block `research:` of a recipe
alignment         the alignment loss, which draws updates into the weights' leading subspaces
bank              many adapters of one base, with one per sequence of a batch (`mora-ds evaluate-adapters`)
spectrum          singular values and ranks of merged updates (`mora-ds spectrum`)

Other packages import these modules inside the function that needs one: for its command or
for the block `research:` of a recipe.
"""
