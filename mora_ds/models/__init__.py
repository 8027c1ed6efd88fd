"""Base models: Hugging Face folders read and written, loss, vocabulary.

base            `BaseCheckpoint`: the original weights on disk, their fingerprint and the names of parameters
attention       which attention a model runs: by documents, or dense
document_attention  causal attention inside each document of packed rows
decoder_layers  decoder layers, and the frozen weights of each alone
node_base       `NodeBase`: the frozen base that the processes of a node share, and who writes which layer
load            Hub name or folder -> live model; configs
dequantize      bases in FP8 and MXFP4, written as a base of the run's own
rope            --rope_scaling: changes of a base's rotary embeddings
stored_names    names of tensors in files and in the live model
save            writes a model folder tensor by tensor
loss            the loss of a batch, optionally in chunks of tokens
vocabulary      adds rows to embeddings and head for new tokens
"""
