"""What papers on MoRA and ReMoRA name and our measurements do not recommend, or few
use.

analyze           ranks of frozen weights, and plans under a budget (`mora-ds analyze`)
targets           plans of which layers get a MoRA matrix, and of what side; the block `research:` of a recipe
bank              many adapters of one base, each row of a batch with its own (`mora-ds evaluate-adapters`)
spectrum          singular values and ranks of merged updates (`mora-ds spectrum`)

Other packages import these modules inside the function that needs one: where its command or
the block `research:` of a recipe asks for it.
"""
