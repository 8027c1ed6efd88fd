"""A layer's product in few operations, each of which reads and writes every number
once: made for GPUs.

tables      the operator's indices as int32 buffers, which a layer holds; in how many parts `product` sums
ops         `torch.ops.mora_ds`: gather_sum, gather_add_, effective_weight, product, sum_parts; their shapes on `meta`
triton_ops  those in Triton, imported at the first call on a GPU (CUDA builds of torch bring triton along)
linear      an adapted layer's product made of them, over activations or over the weight, with its gradients

Training only: merges, the merge ledger and exports add deltas by `ops.mora` and
`ops.updates`, whose bits are the same on every device. A kernel rounds once where those
round after every addition.
"""
