"""Model parallelism: tensor parallelism and Ulysses sequence parallelism.

topology             process groups and their collectives
tp_plan              which layers are split, from the model's own plan
tensor_parallel      splits the layers of a model over a group
windows              the part of a MoRA operator that one rank computes
ulysses              sequence parallelism, and checks of model configs for it
limits               settings that cannot be combined with either
"""
