"""Adapters: their configuration, their layers, and how a Hugging Face model gets them.

config             `MoRAConfig`, `LoRAConfig`: what is adapted, with which operator and size
registry           the names of all adapters, where their classes are, and what each supports
inject             replaces a model's linear layers, freezes the rest, and reports
layer              the adapted layers, and their frozen weight formed anew at a merge
domains            layers with one MoRA matrix for each domain, added to the shared one (`domain_names`)
target_modules     which layers are adapted, by patterns (`target_patterns`)
experts            experts of a mixture: which tensors they are, and how they are computed with a MoRA matrix each
new_embeddings     training of added vocabulary rows only
low_rank_embeddings    a trained product that is added to embeddings and head
nf4                frozen weights in 4 bits, with the terms of merged cycles
quantized          which layers hold their weight in 8 or 4 bits, and its bytes
kernels            a layer's product on a GPU, in few Triton kernels
ops                the tensor functions below all of these
"""
