"""Base models: Hugging Face folders read and written, loss, vocabulary, singular vectors.

base            `BaseCheckpoint`: the original weights on disk, their fingerprint and the names of parameters
node_base       `NodeBase`: the frozen base that the processes of a node share, and who writes which layer
load            Hub name or folder -> live model; configs
save            writes a model folder tensor by tensor
loss            the loss of a batch, optionally in chunks of tokens
vocabulary      adds rows to embeddings and head for new tokens
svd             leading singular vectors of a matrix
"""
