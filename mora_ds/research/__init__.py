"""What papers on MoRA and ReMoRA name and our measurements do not recommend, or few use.

spectrum          singular values and ranks of merged updates (`mora-ds spectrum`)

No other package imports these modules: `mora_ds.common.research` loads one where its command or the block `research:`
of a recipe asks for it.
"""
