"""Base models: reading and writing Hugging Face folders, attention, loss, vocabulary.

base            `BaseCheckpoint`: the base weights on disk, their fingerprint, and their parameter names
attention       document attention: causal, inside each document of packed sequences; which models use it
decoder_layers  decoder layers, and the frozen weights that only one layer uses
load            Hub name or folder -> model in memory; configs
dequantize      converts bases in FP8 and MXFP4 to a base in the run's folder
rope            --rope_scaling: changes of a base's rotary embeddings
stored_names    names of tensors in files and in the model
save            writes a model folder tensor by tensor
svd             leading singular vectors of a matrix
loss            the loss of a batch, optionally in chunks of tokens
vocabulary      adds rows to embeddings and head for new tokens
"""
