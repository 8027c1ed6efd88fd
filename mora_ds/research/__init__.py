"""What papers on MoRA and ReMoRA name and our measurements do not recommend, or few use.

bank              many adapters of one base, each row of a batch with its own (`mora-ds evaluate-adapters`)
spectrum          singular values and ranks of merged updates (`mora-ds spectrum`)

No other package imports these modules: `mora_ds.common.research` loads one where its command or the block `research:`
of a recipe asks for it.
"""
